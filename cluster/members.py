"""Hosts that come to a pool and leave it: what `Control` inherits."""

from __future__ import annotations

from collections.abc import Sequence

from .loading import Loader
from .observed import View
from .operations import forgotten
from .placement import ExpertKey, ModelShape
from .plan import PoolHost, Wishes
from .publishing import Publisher


class Members:
    """A host that leaves is retired first: drained, then taken out of placements, and free as soon
    as every live router has acknowledged one without it, or its lease has ended."""

    view: View
    publisher: Publisher
    loader: Loader
    wishes: Wishes
    models: dict[str, ModelShape]
    unplaced: tuple[ExpertKey, ...]

    def wanted(self, host: str) -> Sequence[ExpertKey]:
        """What the target gives ``host``."""
        raise NotImplementedError

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
