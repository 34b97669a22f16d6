"""What a change of the placement brought, measured behind its end.

The load that is counted in the seconds behind a change is put under the shares from before it and
under those that it brought: it is the same load, so the difference is the change's own. Beside it
stand the choices that each host answered, before and behind, which no model is needed for.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..load.meter import HostTimes
from ..load.tracker import LoadTracker, grown
from ..placement import LayerKey, LayerPlacement, Placement
from ..planner.balance import balancedness
from ..planner.consolidation import least_use
from ..planner.plan import PoolHost
from .changes import Change, Effect, Phase

# Routers report once a second: shorter windows say nothing.
_LEAST_S = 1.0
# Changes of which something stands.
_STANDS = (Phase.DONE, Phase.FAILED)


def balancedness_under(
    layers: Mapping[LayerKey, LayerPlacement],
    loads: Mapping[LayerKey, np.ndarray],
    hosts: Sequence[PoolHost],
    fan_out: float = 0.0,
) -> dict[LayerKey, float]:
    """Balancedness over ``hosts`` of each layer that has load, as the shares split it, with the
    policy's ``fan_out``."""
    index = {host.name: h for h, host in enumerate(hosts)}
    speed_H = np.array([host.speed for host in hosts])
    found = {}
    least = least_use(loads.values(), speed_H, fan_out) if index else 0.0
    for key, layer in layers.items():
        load_E = loads.get(key)
        if load_E is None or len(load_E) != len(layer.replicas) or not load_E.any() or not index:
            continue
        load_H = np.zeros(len(hosts))
        for load, replicas in zip(load_E.tolist(), layer.replicas, strict=True):
            for host, share in replicas:
                if host in index:
                    load_H[index[host]] += load * share
        found[key] = balancedness(load_H, speed_H, least)
    return found


@dataclass(frozen=True, slots=True)
class _Reading:
    """Totals of the load at one moment."""

    at: float
    counts: Mapping[LayerKey, np.ndarray]
    hosts: Mapping[str, HostTimes]

    @classmethod
    def of(cls, loads: LoadTracker, now: float) -> _Reading:
        return cls(now, dict(loads.totals), {h: replace(t) for h, t in loads.hosts.items()})

    def choices_per_s(self, later: _Reading) -> dict[str, float]:
        seconds = later.at - self.at
        return {
            host: round(times.since(self.hosts.get(host)).choices / seconds, 1)
            for host, times in sorted(later.hosts.items())
        }

    def counts_until(self, later: _Reading) -> dict[LayerKey, np.ndarray]:
        return {key: grown(self.counts.get(key), now) for key, now in later.counts.items()}


class EffectMeter:
    """Watches the last change, and tells it what it brought."""

    def __init__(self, window_s: float, fan_out: float = 0.0) -> None:
        self._window_s = max(window_s, _LEAST_S)
        self._fan_out = fan_out
        self._older: _Reading | None = None
        self._newer: _Reading | None = None
        self._seen: Change | None = None
        self._over = False  # its window has passed
        # Of the change that is seen: choices of hosts before it, and the totals at its end.
        self._before: dict[str, float] = {}
        self._ended: _Reading | None = None
        self._brought: Placement | None = None

    def tick(
        self,
        last: Change | None,
        published: Placement | None,
        loads: LoadTracker,
        hosts: Sequence[PoolHost],
        now: float,
    ) -> None:
        """``published`` is what stands: of a change that failed in part, what came of it."""
        if last is not self._seen:
            # The next change ends the measuring of the one before.
            self._close(loads, hosts, now)
            self._seen, self._ended, self._over = last, None, False
            self._before = self._lately(loads, now)
        if last is not None and last.phase in _STANDS and not self._over:
            if self._ended is None:
                self._ended, self._brought = _Reading.of(loads, now), published
            elif now - self._ended.at >= self._window_s:
                self._close(loads, hosts, now)
                self._over = True
        if self._newer is None or now - self._newer.at >= self._window_s:
            self._older, self._newer = self._newer, _Reading.of(loads, now)

    def _lately(self, loads: LoadTracker, now: float) -> dict[str, float]:
        """Choices per second of each host, over one window or two."""
        since = self._older or self._newer
        if since is None or now - since.at < _LEAST_S:
            return {}
        return since.choices_per_s(_Reading.of(loads, now))

    def _close(self, loads: LoadTracker, hosts: Sequence[PoolHost], now: float) -> None:
        change, ended, brought = self._seen, self._ended, self._brought
        if self._over or change is None or ended is None or brought is None:
            return
        if change.phase not in _STANDS or now - ended.at < _LEAST_S:
            return
        reading = _Reading.of(loads, now)
        counts = ended.counts_until(reading)
        before = balancedness_under(change.layers_before, counts, hosts, self._fan_out)
        after = balancedness_under(brought.layers, counts, hosts, self._fan_out)
        if before and after:
            change.effect = Effect(
                seconds=now - ended.at,
                before=before,
                after=after,
                choices_before=self._before,
                choices_after=ended.choices_per_s(reading),
            )
