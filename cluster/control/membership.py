"""Hosts that come to a pool and leave it: what `Control` inherits."""

from __future__ import annotations

from ..placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, every_expert, experts_of
from ..planner.plan import PoolHost, Wishes
from .host_speed import SILENT
from .idle_models import Sleep
from .loading import Loader
from .operations import forgotten
from .pool_view import View
from .publishing import Publisher

# A host that lacks a larger part of what it is to hold gets no traffic yet.
_LOADING = 0.5


class Members:
    """A host that leaves is retired first: drained, then taken out of placements, and free as soon
    as every live router has acknowledged one without it, or its lease has ended."""

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
        """Changes with the hosts that are seen, what they hold, the target and the models."""
        return self.view.version, self._target_version, tuple(self.models.values())

    def add_host(self, host: PoolHost) -> None:
        """A host that is to come; it is put to use as soon as it reports."""
        self.view.add(host)

    def retire_host(self, name: str) -> None:
        """Drain a host, so that `remove_host` may follow; `keep_host` takes it back."""
        self.view.retiring.add(name)
        self.view.version += 1  # an empty one leaves placements at once

    def keep_host(self, name: str) -> None:
        self.view.retiring.discard(name)
        self.view.version += 1  # routers are to hear of it again

    def remove_host(self, name: str) -> None:
        """Forget a host that `Control.is_free` says nobody needs."""
        self.view.remove(name)
        self.publisher.forget(name)
        self.loader.forget(name)
        self.wishes = forgotten(self.wishes, name)

    def wanted(self, host: str) -> list[ExpertKey]:
        """What a host is to hold."""
        if host not in self._wanted:
            self._wanted[host] = experts_of(self._target or {}, host)
        return self._wanted[host]

    def parts(self) -> dict[str, float]:
        """Of its speed that a host is planned with, if that is not all of it: by its pace, and next
        to none while it has yet to load most of what it is to hold, as behind a restart."""
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
        """Experts that no host holds now, and why."""
        return {
            key: "loading" if key.model in self.loader.on_disk else "lost: its model was in memory"
            for key in every_expert(self._awake())
            if not self.view.holders(key)
        }

    def is_free(self, host: str, now: float) -> bool:
        """Whether a retired host holds nothing, gets nothing, and no router knows it any more."""
        idle = host in self.view.retiring and self.view.empty(host) and not self.wanted(host)
        # One that was never seen is still to come, or has been frozen since before this controller
        # began, and then it may hold what nobody else does.
        if not idle or (self.view.never_seen(host) and self.missing()):
            return False
        return self.view.is_known(host) and self.publisher.has_left(host, now)

    @property
    def leaving(self) -> frozenset[str]:
        """Hosts that are to hold nothing, drained by operators or on their way out."""
        return self.wishes.leaving | self.view.retiring

    def no_room(self) -> dict[str, str]:
        """Hosts that cannot leave, with what is lacking in words: they go on serving the experts
        for which no other host has room, and leave when there is some."""
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
