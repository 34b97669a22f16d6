"""The commands of the controller's state machine.

`actors/controller/controller.py` carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..expert_keys import ExpertVersion, LayerKey
from ..placement import LayerPlacement, ModelShape, Placement
from ..planner.capacity import keep_unplaced_on_leaving
from ..planner.plan import OperatorConstraints, Plan, PlannerPolicy, PoolHost
from ..planner.planner import plan
from ..planner.upkeep import ReplicaUpkeep
from .loading import LoadExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Send a placement to all routers."""

    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """Let ``host`` drop ``weights``: no router sends calls for them to it any more."""

    host: str
    weights: tuple[ExpertVersion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRun:
    """Let ``host`` forget a training run that does not live, with all that it owns for it."""

    host: str
    run: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePlan:
    """Run the planner, which may take seconds, and tell `Control.planned` what it found."""

    models: Sequence[ModelShape]
    hosts: Sequence[PoolHost]
    current: Mapping[LayerKey, LayerPlacement]
    loads: Mapping[LayerKey, np.ndarray]
    policy: PlannerPolicy
    constraints: OperatorConstraints
    key: object  # hosts, models and constraints that it is for; if they change, the plan is void
    version: int  # the target that it starts from; if that changes, the plan is void
    balance: bool  # whether the plan is adopted only if it gains balance
    upkeep: ReplicaUpkeep | None = None  # of the model that a run trains; None: there is no run

    def run(self) -> Plan:
        """Run the planner; experts without room elsewhere stay on leaving hosts."""
        found = plan(
            models=self.models,
            hosts=self.hosts,
            current=self.current,
            loads=self.loads,
            policy=self.policy,
            constraints=self.constraints,
            upkeep=self.upkeep,
        )
        return keep_unplaced_on_leaving(
            found,
            models=self.models,
            hosts=self.hosts,
            leaving=self.constraints.leaving,
            current=self.current,
        )


ControlCommand = LoadExperts | Publish | Evict | EndRun | MakePlan
