"""Hosts that join a pool and leave it: the part of `Control` that it inherits."""

from __future__ import annotations

from ..placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, every_expert, experts_of
from ..planner.plan import PoolHost, Wishes
from .host_speed import SILENT
from .idle_models import Sleep
from .loading import Loader
from .operations import forgotten
from .pool_view import View
from .publishing import Publisher

# A host that lacks a larger fraction of its wanted experts gets next to no traffic yet.
_LOADING = 0.5


class Members:
    """Membership of the pool.

    A host that leaves is retired first: it is drained, then taken out of placements. It is free as
    soon as each live router has acknowledged a placement without it, or its lease has ended.
    """

    view: View
    publisher: Publisher
    loader: Loader
    sleep: Sleep
    wishes: Wishes
    models: dict[str, ModelShape]
    unplaced: tuple[ExpertKey, ...]
    _target_version: int
    _target: dict[LayerKey, LayerPlacement] | None
    _wanted: dict[str, list[ExpertKey]]
    _parts: dict[str, float]
    _parts_for: object

    @property
    def state(self) -> object:
        """A value that changes with the hosts seen, what they hold, the target and the models."""
        return self.view.version, self._target_version, tuple(self.models.values())

    def add_host(self, host: PoolHost) -> None:
        """Announce a new host; it is used as soon as it reports."""
        self.view.add(host)

    def retire_host(self, name: str) -> None:
        """Drain a host, so that `remove_host` may follow; `keep_host` revokes it."""
        self.view.retiring.add(name)
        self.view.version += 1  # an empty host leaves placements at once

    def keep_host(self, name: str) -> None:
        """Keep a host that was retired."""
        self.view.retiring.discard(name)
        self.view.version += 1  # the next placement names it to routers again

    def remove_host(self, name: str) -> None:
        """Forget a host that is free according to `is_free`."""
        self.view.remove(name)
        self.publisher.forget(name)
        self.loader.forget(name)
        self.wishes = forgotten(self.wishes, name)

    def wanted(self, host: str) -> list[ExpertKey]:
        """Return the experts that the target places on a host."""
        if host not in self._wanted:
            self._wanted[host] = experts_of(self._target or {}, host)
        return self._wanted[host]

    def parts(self) -> dict[str, float]:
        """Return the speed factor of each host that is planned with less than its full speed.

        It is below 1 for slow hosts, and near 0 for silent hosts and while a host still has to load
        most of its wanted experts, for example after a restart.
        """
        if self._parts_for != self.state:
            self._parts_for = self.state
            lacking = {
                host: len(self.loader.lacking(host, self.wanted(host))) / len(self.wanted(host))
                for host in self.view.seen
                if self.wanted(host)
            }
            loading = [host for host, part in lacking.items() if part > _LOADING]
            self._parts = dict.fromkeys(loading, SILENT) if len(loading) < len(lacking) else {}
        return self.view.parts | self._parts

    def missing(self) -> dict[ExpertKey, str]:
        """Return the experts that no host holds now, and why."""
        return {
            key: "loading" if key.model in self.loader.on_disk else "lost: its model was in memory"
            for key in every_expert(self._awake())
            if not self.view.holders(key)
        }

    def is_free(self, host: str, now: float) -> bool:
        """Return whether a retired host holds nothing, gets nothing, and no router uses it."""
        idle = host in self.view.retiring and self.view.empty(host) and not self.wanted(host)
        # A host that was never seen is either still starting, or has been frozen since before this
        # controller began. In the latter case it may hold the experts that are missing.
        if not idle or (self.view.never_seen(host) and self.missing()):
            return False
        return self.view.is_known(host) and self.publisher.has_left(host, now)

    @property
    def leaving(self) -> frozenset[str]:
        """Hosts that must become empty: drained by operators, or retired."""
        return self.wishes.leaving | self.view.retiring

    def no_room(self) -> dict[str, str]:
        """Return the leaving hosts that cannot leave, with the reason as text.

        They go on serving the experts for which no other host has room, and leave once there is.
        """
        unplaced, words = set(self.unplaced), {}
        for host in sorted(self.leaving & self.view.hosts.keys()):
            stuck = unplaced.intersection(self.wanted(host))
            if stuck:
                size = sum(self.models[key.model].expert_bytes for key in stuck)
                words[host] = (
                    f"no other host has room for {len(stuck)} of its experts ({size / 1e6:,.1f} MB)"
                )
        return words

    def _awake(self) -> list[ModelShape]:
        return self.sleep.awake(self.models.values())
