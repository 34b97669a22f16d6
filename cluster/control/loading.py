"""What each host is to load next, from where, and how fast."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..placement import ExpertKey, HostEntry, ModelShape
from .pool_view import View

# Slots beside a host's own, for replicas that have come while those they replace still serve.
_STAGING = 4
# A background load brings no more than what the rate allows in so long: few at once, then a rest.
_BATCH_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Let ``host`` get ``keys``: from a checkpoint, or from the peers that are named."""

    host: str
    keys: tuple[ExpertKey, ...]
    peers: Mapping[ExpertKey, HostEntry]  # keys without one are read from disk


class Loader:
    """Hands out loads; remembers what failed."""

    def __init__(self, view: View, *, bytes_per_s: float, batch_bytes: int, retry_s: float) -> None:
        """A host loads in the background ``bytes_per_s`` in the mean, and no more than
        ``batch_bytes`` at once; what somebody waits for is not held back."""
        self.on_disk: set[str] = set()  # models with a checkpoint that hosts can read
        self.slots: dict[str, int] = {}
        self._view = view
        self._bytes_per_s = bytes_per_s
        self._batch_bytes = min(batch_bytes, bytes_per_s * _BATCH_S)
        self._retry_s = retry_s
        self._not_before: dict[str, float] = {}
        self._failures: dict[ExpertKey, int] = {}

    def reset(self) -> None:
        """A new target: old failures say nothing about it."""
        self._failures.clear()

    def forget(self, host: str) -> None:
        """A host was removed."""
        self._not_before.pop(host, None)

    def failed(self, host: str, keys: Sequence[ExpertKey], now: float) -> list[ExpertKey]:
        """A load ended without its replicas. Gives those that had failed before."""
        self._not_before[host] = now + self._retry_s
        again = []
        for key in keys:
            if not self._view.holds(host, key):
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
    ) -> Load | None:
        """The next load of an idle host. Models that have not ``appeared`` are waited for."""
        if now < self._not_before.get(host, 0.0):
            return None
        lacking = self.lacking(host, wanted)
        urgent = [
            key for key in lacking if key.model not in appeared or not self._view.holders(key)
        ]
        keys = urgent or self._batch(host, lacking, len(wanted), models)
        peers = {key: source for key in keys if (source := self._source(key, host)) is not None}
        if not keys:
            return None
        if not urgent:
            used_bytes = sum(models[key.model].expert_bytes for key in keys)
            self._not_before[host] = now + used_bytes / self._bytes_per_s
        return Load(host=host, keys=tuple(keys), peers=peers)

    def lacking(self, host: str, wanted: Sequence[ExpertKey]) -> list[ExpertKey]:
        """What ``host`` is still to get. What only memory held and nobody holds any more will never
        come, so nothing waits for it."""
        return [
            key
            for key in wanted
            if not self._view.holds(host, key)
            and (key.model in self.on_disk or self._view.holders(key))
        ]

    def _batch(
        self, host: str, lacking: list[ExpertKey], wanted: int, models: Mapping[str, ModelShape]
    ) -> list[ExpertKey]:
        """As many as one background load may bring: few bytes at once, and no more replicas than
        there is room for until those that they replace are evicted."""
        held = sum(1 for _ in self._view.seen[host].experts())
        # A target can name more than a host has slots now, where these are an even part of what
        # models need and hosts came back.
        room = max(0, max(self.slots.get(host, held), wanted) + _STAGING - held)
        room_bytes, batch = self._batch_bytes, []
        for key in lacking[:room]:
            room_bytes -= models[key.model].expert_bytes
            if batch and room_bytes < 0:
                break
            batch.append(key)
        return batch

    def _source(self, key: ExpertKey, host: str) -> HostEntry | None:
        """The peer to get an expert from; None for the checkpoint. After a failure another one."""
        holders = [name for name in self._view.holders(key) if name != host]
        failures = self._failures.get(key, 0)
        if not holders or (key.model in self.on_disk and failures % 2 == 0):
            return None
        return self._view.seen[holders[(key.expert + failures) % len(holders)]].entry
