"""The hosts of a placement as one router knows them, and how it divides assignments among them.

Shape suffixes: H = hosts in the placement's order, n = assignments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ..expert_keys import ExpertKey, LayerKey
from ..placement import Placement
from ..versions import LayerVersions
from .assignment import choose_hosts
from .events import Disconnect, RouterCommand, Send
from .host_health import BEST_RANK, HostHealth, HostState
from .layer_call import LayerCall
from .policy import RouterPolicy
from .routes import Routes
from .row_grouping import SendRows


class HostRegistry:
    """The current placement and the health of each of its hosts."""

    def __init__(self, policy: RouterPolicy) -> None:
        self.placement: Placement | None = None
        self.hosts: dict[str, HostHealth] = {}
        self._policy = policy
        self._routes: Routes | None = None
        self._all_known = False  # every host of the routes is one of the placement
        # Which hosts are usable, and their ranks, where nothing is wrong.
        self._all_best = np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int8)
        self._unsettled: set[str] = set()  # the hosts that `tick` has to look at
        self._versions: dict[LayerKey, LayerVersions] = {}

    def place(self, placement: Placement) -> list[str]:
        """Follow ``placement``; return the hosts that it names with another incarnation.

        Their old connections are to be closed.
        """
        # A change of versions alone keeps what was made of the layers.
        if self.placement is None or placement.layers is not self.placement.layers:
            self._routes = Routes(placement)
        self.placement = placement
        self._versions.clear()
        assert self._routes is not None
        self._all_known = all(host in placement.hosts for host in self._routes.hosts)
        hosts = len(self._routes.hosts)
        self._all_best = np.ones(hosts, dtype=bool), np.full(hosts, BEST_RANK, dtype=np.int8)
        over = []
        for name, health in list(self.hosts.items()):
            entry = placement.hosts.get(name)
            if entry is None:
                health.leave()
            elif entry != health.entry:
                over.append(name)
                del self.hosts[name]
        for name, entry in placement.hosts.items():
            known = self.hosts.get(name)
            if known is None:
                self.hosts[name] = HostHealth(entry, self._policy, self._unsettled)
            elif known.state is HostState.LEAVING:
                known.state = HostState.UP
        return over

    def tick(self, now: float) -> Iterator[RouterCommand]:
        """Yield due probes and connections, and disconnect idle hosts that left the placement."""
        if not self._unsettled:
            return
        for name in [name for name in self.hosts if name in self._unsettled]:
            health = self.hosts[name]
            yield from health.tick(now)
            if health.state is HostState.LEAVING and not health.occupied:
                yield Disconnect(name)
                del self.hosts[name]
                self._unsettled.discard(name)
            elif health.is_settled(now):
                self._unsettled.discard(name)

    def wake_at(self, now: float, *, work_waits: bool) -> float:
        due = (self.hosts[name].wake_at(now, work_waits=work_waits) for name in self._unsettled)
        return min(due, default=math.inf)

    def versions(self, key: LayerKey) -> LayerVersions:
        """Return the versions of a layer's experts that the placement names."""
        assert self.placement is not None
        found = self._versions.get(key)
        if found is None:
            found = self._versions[key] = self.placement.versions.layer(key)
        return found

    @property
    def all_up(self) -> bool:
        """Whether there are hosts, and each of them accepts calls."""
        states = {health.state for health in self.hosts.values()}
        return states == {HostState.UP}

    def unplaced(self, layers: Sequence[LayerKey]) -> list[LayerKey]:
        """Return those of ``layers`` that are not in the placement."""
        return [k for k in layers if self.placement is None or k not in self.placement.layers]

    def has(self, expert: ExpertKey, now: float) -> bool:
        """Return whether some host that is placed for the expert takes calls now."""
        layers = {} if self.placement is None else self.placement.layers
        layer = layers.get(LayerKey(expert.model, expert.layer))
        if layer is None or expert.expert >= len(layer.replicas):
            return False
        healths = (self.hosts.get(host) for host in layer.hosts(expert.expert))
        return any(health is not None and health.takes_calls(now) for health in healths)

    def takes(self, send: Send, call: LayerCall, now: float) -> bool:
        """Return whether a call may begin like an earlier one, of which ``send`` was a part.

        Its host must take calls now, and be placed for the same versions of the same experts.
        """
        health = self.hosts.get(send.host)
        if health is None or health.entry.incarnation != send.incarnation:
            return False
        if not health.takes_calls(now) or not health.rank(now) or self.unplaced([call.key]):
            return False
        if send.token_t.size > call.max_rows:
            return False
        assert self._routes is not None
        host, versions = self._routes.index.get(send.host), self.versions(call.key)
        held_EH = self._routes.layer(call.key).held_EH
        named = versions.most, versions.others_of(send.ids_tk)
        return (
            host is not None
            and bool(held_EH[call.ids_N[send.assignments], host].all())
            and named == (send.version, send.other_versions)
        )

    def choose(
        self, call: LayerCall, assignment_n: np.ndarray, now: float, *, besides: str = ""
    ) -> np.ndarray:
        """Return for each assignment the index of a host that takes it now, or -1.

        ``besides`` is the late host when a hedge is planned: it and hosts of rank 0 are left out.
        The placement must contain the call's layer.
        """
        assert self._routes is not None
        split_rows = self._policy.split_rows
        if self._all_known and not self._unsettled and not besides:
            usable_H, rank_H = self._all_best
            return choose_hosts(
                call, assignment_n, self._routes, usable_H, rank_H, split_rows=split_rows
            )
        healths = [self.hosts.get(name) for name in self._routes.hosts]
        usable_H = np.array([h is not None and h.takes_calls(now) for h in healths], dtype=bool)
        rank_H = np.array([0 if h is None else h.rank(now) for h in healths], dtype=np.int8)
        if besides:
            usable_H &= (rank_H > 0) & (np.array(self._routes.hosts) != besides)
        return choose_hosts(
            call, assignment_n, self._routes, usable_H, rank_H, split_rows=split_rows
        )

    def pieces(
        self, call: LayerCall, assignment_n: np.ndarray, host_n: np.ndarray
    ) -> Iterator[tuple[HostHealth, SendRows]]:
        """Yield the hosts that were chosen, and what each is sent; a host may come repeatedly."""
        assert self._routes is not None
        for name, rows in call.pieces(self._routes.hosts, assignment_n, host_n):
            yield self.hosts[name], rows
