"""Decide what each host loads next, from where, and how fast."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion
from ..placement import HostEntry, ModelShape
from .pool_view import PoolView

# Extra slots of a host, for new replicas while those that they replace still serve.
_STAGING = 4
# A background load brings at most what the rate allows in this time; then the host pauses.
_BATCH_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadExperts:
    """Let ``host`` load ``weights``, from disk or from the named peers."""

    host: str
    weights: tuple[ExpertVersion, ...]
    peers: Mapping[ExpertVersion, HostEntry]  # those without one are read from disk


class Loader:
    """Gives out loads, and remembers which ones failed."""

    def __init__(
        self, view: PoolView, *, bytes_per_s: float, batch_bytes: int, retry_s: float
    ) -> None:
        """Bound background loads of a host to ``bytes_per_s``, and each to ``batch_bytes``.

        Experts that a request may be waiting for are not bounded. After a failure a host loads
        nothing for ``retry_s`` seconds.
        """
        self.on_disk: set[str] = set()  # models with a checkpoint that hosts can read
        self.saved: set[ExpertVersion] = set()  # later versions that hosts can read from a file
        self.slots: dict[str, int] = {}
        self._view = view
        self.follow(bytes_per_s, batch_bytes, retry_s)
        self._not_before: dict[str, float] = {}
        self._failures: dict[ExpertKey, int] = {}

    def follow(self, bytes_per_s: float, batch_bytes: int, retry_s: float) -> None:
        """Bound loads like this from now on."""
        self._bytes_per_s = bytes_per_s
        self._batch_bytes = min(batch_bytes, bytes_per_s * _BATCH_S)
        self._retry_s = retry_s

    def reset(self) -> None:
        """Forget all failures, because there is a new target."""
        self._failures.clear()

    def forget(self, host: str) -> None:
        """Forget a host that was removed."""
        self._not_before.pop(host, None)

    def failed(self, host: str, weights: Sequence[ExpertVersion], now: float) -> list[ExpertKey]:
        """Take note of a load that failed; return its replicas that had failed before.

        A version that is not served any more does not count: its source may have evicted it.
        """
        self._not_before[host] = now + self._retry_s
        again = []
        for key, version in weights:
            if version == self._view.versions.of(key) and not self._view.holds(host, key):
                self._failures[key] = self._failures.get(key, 0) + 1
                if self._failures[key] >= 2:
                    again.append(key)
        return again

    def next(
        self,
        host: str,
        wanted: Sequence[ExpertKey],
        *,
        models: Mapping[str, ModelShape],
        appeared: Collection[str],
        now: float,
        arriving: Mapping[ExpertKey, int] = MappingProxyType({}),
    ) -> LoadExperts | None:
        """Return the next load of an idle host, or None.

        Experts that no host holds, and those of models that have not ``appeared`` in a placement
        yet, are urgent: they are loaded first and at full speed. Versions that are ``arriving``
        come last, beside those that are served.
        """
        if now < self._not_before.get(host, 0.0):
            return None
        seen = self._view.observations[host]
        lacking = [key for key in self.lacking(host, wanted) if seen.has_room(key)]
        urgent = [
            key for key in lacking if key.model not in appeared or not self._view.holders(key)
        ]
        keys = urgent or self._batch(host, lacking, len(wanted), models)
        weights = [self._view.versions.served(key) for key in keys]
        weights = weights or self._arriving(host, wanted, arriving, models)
        if not weights:
            return None
        peers = {one: source for one in weights if (source := self._source(one, host)) is not None}
        if not urgent:
            used_bytes = sum(models[one.key.model].expert_bytes for one in weights)
            self._not_before[host] = now + used_bytes / self._bytes_per_s
        return LoadExperts(host=host, weights=tuple(weights), peers=peers)

    def is_on_disk(self, weights: ExpertVersion) -> bool:
        """Return whether hosts can read this version of an expert from a file."""
        first = weights.version == FIRST_VERSION
        return weights.key.model in self.on_disk if first else weights in self.saved

    def why_missing(self, weights: ExpertVersion) -> str:
        """Return why no host holds this version of an expert."""
        if self.is_on_disk(weights):
            return "loading"
        if weights.version == FIRST_VERSION:
            return "lost: its model was attached from memory, and no file has its weights"
        return f"lost: only hosts' memory had version {weights.version}"

    def lacking(self, host: str, wanted: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the ``wanted`` experts that ``host`` lacks and can still get.

        An expert whose version is in no file and on no host is lost, so it is left out.
        """
        return [
            key
            for key in wanted
            if not self._view.holds(host, key)
            and (self.is_on_disk(self._view.versions.served(key)) or self._view.holders(key))
        ]

    def _batch(
        self, host: str, lacking: list[ExpertKey], wanted: int, models: Mapping[str, ModelShape]
    ) -> list[ExpertKey]:
        """Return the experts of one background load.

        It is bounded in bytes, and to the replicas that fit until those that they replace are
        evicted.
        """
        held = sum(1 for _ in self._view.observations[host].experts())
        # If the slots are computed (`with_default_slots`), they shrink when hosts come back, and
        # the target may name more experts than the host now has slots.
        room = max(0, max(self.slots.get(host, held), wanted) + _STAGING - held)
        return self._bounded(lacking[:room], models)

    def _arriving(
        self,
        host: str,
        wanted: Sequence[ExpertKey],
        arriving: Mapping[ExpertKey, int],
        models: Mapping[str, ModelShape],
    ) -> list[ExpertVersion]:
        """Return the versions that are arriving and that ``host`` lacks and can get."""
        mine = [key for key in arriving.keys() & set(wanted) if key.model in models]
        found = [ExpertVersion(key, arriving[key]) for key in sorted(mine)]
        seen, view = self._view.observations[host], self._view
        lacking = [
            one.key
            for one in found
            if not seen.holds(one)
            and seen.has_room(one.key)
            and (self.is_on_disk(one) or view.holders(one.key, one.version))
        ]
        return [ExpertVersion(key, arriving[key]) for key in self._bounded(lacking, models)]

    def _bounded(
        self, keys: Sequence[ExpertKey], models: Mapping[str, ModelShape]
    ) -> list[ExpertKey]:
        """Return the first of ``keys``, as many as one background load may have; at least one."""
        room_bytes, batch = self._batch_bytes, []
        for key in keys:
            room_bytes -= models[key.model].expert_bytes
            if batch and room_bytes < 0:
                break
            batch.append(key)
        return batch

    def _source(self, weights: ExpertVersion, host: str) -> HostEntry | None:
        """Return the peer to load an expert from, or None for the disk.

        After each failure it is another source, by turns the disk and a peer if both exist.
        """
        key = weights.key
        holders = [name for name in self._view.holders(*weights) if name != host]
        failures = self._failures.get(key, 0)
        if not holders or (self.is_on_disk(weights) and failures % 2 == 0):
            return None
        return self._view.observations[holders[(key.expert + failures) % len(holders)]].entry
