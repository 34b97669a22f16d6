"""The hosts of a placement as one router knows them, and how it divides assignments among them.

Shape suffixes: H = hosts in the placement's order, n = assignments, t and k = rows and columns of
one send.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..expert_keys import ExpertKey, LayerKey
from ..placement import Placement, PlacementId
from ..versions import LayerVersions
from .assignment import choose_hosts
from .events import Disconnect, RouterCommand, Send
from .host_health import HostHealth, HostState
from .layer_call import LayerCall
from .policy import RouterPolicy
from .routes import Routes
from .row_grouping import SendRows


class SendPart(NamedTuple):
    """Assignments that go to one host in one send."""

    health: HostHealth
    placement_id: PlacementId
    versions: LayerVersions
    rows: SendRows

    @property
    def assignments(self) -> np.ndarray:
        return self.rows.assignments

    def send(self, call: LayerCall, seq: int, *, timeout_s: float, attempt: int) -> Send:
        assignments, token_t, assignment_tk = self.rows
        ids_tk = call.ids_N[assignment_tk]
        if assignments.size < assignment_tk.size:
            ids_tk[assignment_tk < 0] = -1
        return Send(
            call=call.number,
            placement_id=self.placement_id,
            host=self.health.entry.host,
            incarnation=self.health.entry.incarnation,
            seq=seq,
            timeout_s=timeout_s,
            attempt=attempt,
            version=self.versions.most,
            other_versions=self.versions.others_of(ids_tk),
            token_t=token_t,
            assignment_tk=assignment_tk,
            ids_tk=ids_tk,
            assignments=assignments,
        )


class HostRegistry:
    """The current placement and the health of each of its hosts."""

    def __init__(self, policy: RouterPolicy) -> None:
        self.placement: Placement | None = None
        self.hosts: dict[str, HostHealth] = {}
        self._policy = policy
        self._routes: Routes | None = None

    def place(self, placement: Placement) -> list[str]:
        """Follow ``placement``; return the hosts that it names with another incarnation.

        Their old connections are to be closed.
        """
        # A change of versions alone keeps what was made of the layers.
        if self.placement is None or placement.layers is not self.placement.layers:
            self._routes = Routes(placement)
        self.placement = placement
        over = []
        for name, health in list(self.hosts.items()):
            entry = placement.hosts.get(name)
            if entry is None:
                health.state = HostState.LEAVING
            elif entry != health.entry:
                over.append(name)
                del self.hosts[name]
        for name, entry in placement.hosts.items():
            known = self.hosts.get(name)
            if known is None:
                self.hosts[name] = HostHealth(entry, self._policy)
            elif known.state is HostState.LEAVING:
                known.state = HostState.UP
        return over

    def tick(self, now: float) -> Iterator[RouterCommand]:
        """Yield due probes and connections, and disconnect idle hosts that left the placement."""
        for name, health in list(self.hosts.items()):
            yield from health.tick(now)
            if health.state is HostState.LEAVING and not health.occupied:
                yield Disconnect(name)
                del self.hosts[name]

    def wake_at(self, now: float, *, work_waits: bool) -> float:
        due = (host.wake_at(now, work_waits=work_waits) for host in self.hosts.values())
        return min(due, default=float("inf"))

    def has(self, expert: ExpertKey, now: float) -> bool:
        """Return whether some host that is placed for the expert takes calls now."""
        layers = {} if self.placement is None else self.placement.layers
        layer = layers.get(LayerKey(expert.model, expert.layer))
        if layer is None or expert.expert >= len(layer.replicas):
            return False
        healths = (self.hosts.get(host) for host in layer.hosts(expert.expert))
        return any(health is not None and health.takes_calls(now) for health in healths)

    def choose(
        self, call: LayerCall, assignment_n: np.ndarray, now: float, *, besides: str = ""
    ) -> np.ndarray:
        """Return for each assignment the index of a host that takes it now, or -1.

        ``besides`` is the late host when a hedge is planned: it and hosts of rank 0 are left out.
        The placement must contain the call's layer.
        """
        assert self._routes is not None
        healths = [self.hosts.get(name) for name in self._routes.hosts]
        usable_H = np.array([h is not None and h.takes_calls(now) for h in healths], dtype=bool)
        rank_H = np.array([0 if h is None else h.rank(now) for h in healths], dtype=np.int8)
        if besides:
            usable_H &= (rank_H > 0) & (np.array(self._routes.hosts) != besides)
        split_rows = self._policy.split_rows
        return choose_hosts(
            call, assignment_n, self._routes, usable_H, rank_H, split_rows=split_rows
        )

    def pieces(
        self, call: LayerCall, assignment_n: np.ndarray, host_n: np.ndarray
    ) -> Iterator[SendPart]:
        """Yield the assignments as sends to the hosts that were chosen for them."""
        assert self._routes is not None and self.placement is not None
        number, versions = self.placement.id, self.placement.versions.layer(call.key)
        for name, rows in call.pieces(self._routes.hosts, assignment_n, host_n):
            yield SendPart(self.hosts[name], number, versions, rows)
