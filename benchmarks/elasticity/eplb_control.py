"""A controller that balances by DeepSeek's rule, to compare with; everything else is ours.

Every `balance.every_s` it takes the placement of `cluster/comparison/eplb.py` for the same forecast
that our planner gets, with as many slots for each layer, and our own loader, publisher and
evictions carry it out. While it moves, its hosts may hold twice their slots: it changes nearly all
of them at once.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moesaic.actors.controller import restoring
from moesaic.actors.controller.controller import Controller
from moesaic.cluster.comparison.eplb import eplb
from moesaic.cluster.control.change_impact import balancedness_under
from moesaic.cluster.control.commands import MakePlan
from moesaic.cluster.control.control import Control
from moesaic.cluster.placement import LayerPlacement, Replica
from moesaic.cluster.planner.plan import Move, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbPlan(MakePlan):
    """The same question, answered by DeepSeek's rule. Copies on one host count as one replica with
    their shares added up, which routes alike."""

    def run(self) -> Plan:
        names = [host.name for host in self.hosts]
        slots = min(host.slots or 0 for host in self.hosts) // len(self.current)
        layers = dict(self.current)
        for key, load_E in self.loads.items():
            copies_EH = eplb(load_E, len(names), slots)
            layers[key] = LayerPlacement(tuple(_replicas(row_H, names) for row_H in copies_EH))
        sizes = {shape.model: shape.expert_bytes for shape in self.models}
        moves = tuple(
            Move(
                key=key.expert(expert),
                host=replica.host,
                kind="balance",
                reason="DeepSeek's rule has it there",
                expert_bytes=sizes[key.model],
            )
            for key, layer in layers.items()
            for expert, replicas in enumerate(layer.replicas)
            for replica in replicas
            if replica.host not in self.current[key].hosts(expert)
        )
        return Plan(
            layers=layers,
            moves=moves,
            drops=(),
            before=balancedness_under(self.current, self.loads, self.hosts),
            after=balancedness_under(layers, self.loads, self.hosts),
            unplaced=(),
            unprotected=(),
            lacking_bytes=0,
        )


def _replicas(copies_H: np.ndarray, names: list[str]) -> tuple[Replica, ...]:
    return tuple(
        Replica(name, copies / copies_H.sum())
        for name, copies in zip(names, copies_H.tolist(), strict=True)
        if copies
    )


class EplbControl(Control):
    def plan_for(self, now: float, *, budget: int | None = None, fill: int = 0) -> MakePlan:
        asked = super().plan_for(now, budget=budget, fill=fill)
        if not asked.balance:
            return asked  # the first placement, and hosts that come and go
        self.loader.slots = {host: 2 * slots for host, slots in self.loader.slots.items()}
        return EplbPlan(**{one.name: getattr(asked, one.name) for one in fields(asked)})


class EplbController(Controller):
    """To be put in the place of `Controller` before a cluster is started."""

    def __init__(self, *arguments: Any) -> None:
        # In the actor's own process, which holds nothing else.
        restoring.Control = EplbControl
        super().__init__(*arguments)
