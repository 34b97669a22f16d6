"""What the controller's state machine says; `actors/controller/controller.py` is its shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, Placement
from ..planner.capacity import let_stay
from ..planner.plan import Plan, Policy, PoolHost, Wishes
from ..planner.planner import plan
from .loading import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """Nobody sends calls for ``keys`` to ``host`` any more: it can forget them."""

    host: str
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePlan:
    """Run the planner, which may take seconds, and tell `Control.planned` what it found."""

    models: Sequence[ModelShape]
    hosts: Sequence[PoolHost]
    current: Mapping[LayerKey, LayerPlacement]
    loads: Mapping[LayerKey, np.ndarray]
    policy: Policy
    wishes: Wishes
    key: object  # what the plan is for; it is of no use for anything else,
    version: int  # nor for another target than this one
    balance: bool  # whether only a gain makes it worth while

    def run(self) -> Plan:
        found = plan(
            models=self.models,
            hosts=self.hosts,
            current=self.current,
            loads=self.loads,
            policy=self.policy,
            wishes=self.wishes,
        )
        return let_stay(
            found,
            models=self.models,
            hosts=self.hosts,
            leaving=self.wishes.leaving,
            current=self.current,
        )


Command = Load | Publish | Evict | MakePlan
