"""Measure the effect of a change of the placement.

The load counted in the seconds after a change is evaluated twice, under the shares from before it
and under the new ones. The load is the same, so the change alone makes the difference. In addition
the assignments that each host answered before and after are recorded; these are plain counts.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..expert_keys import LayerKey
from ..load.meter import HostTimes
from ..load.tracker import LoadTracker, grown
from ..placement import LayerPlacement, Placement
from ..planner.balance import balancedness
from ..planner.consolidation import consolidation_level
from ..planner.plan import PoolHost
from ..reports.placing import ChangePhase
from .changes import Change, ChangeImpact

# Routers report once a second, so shorter windows say nothing.
_LEAST_S = 1.0
# Phases of changes that were carried out, at least in part.
_STANDS = (ChangePhase.DONE, ChangePhase.FAILED)


def balancedness_under(
    layers: Mapping[LayerKey, LayerPlacement],
    loads: Mapping[LayerKey, np.ndarray],
    hosts: Sequence[PoolHost],
    fan_out: float = 0.0,
) -> dict[LayerKey, float]:
    """Return the balancedness of each layer with load, split by the shares over ``hosts``.

    ``fan_out`` is that of the planner's policy.
    """
    index = {host.name: h for h, host in enumerate(hosts)}
    speed_H = np.array([host.speed for host in hosts])
    found = {}
    least = consolidation_level(loads.values(), speed_H, fan_out) if index else 0.0
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
    """The counters of the load at one moment."""

    at: float
    counts: Mapping[LayerKey, np.ndarray]
    hosts: Mapping[str, HostTimes]

    @classmethod
    def of(cls, loads: LoadTracker, now: float) -> _Reading:
        return cls(now, dict(loads.totals), {h: replace(t) for h, t in loads.hosts.items()})

    def assignments_per_s(self, later: _Reading) -> dict[str, float]:
        seconds = later.at - self.at
        return {
            host: round(times.since(self.hosts.get(host)).assignments / seconds, 1)
            for host, times in sorted(later.hosts.items())
        }

    def counts_until(self, later: _Reading) -> dict[LayerKey, np.ndarray]:
        return {key: grown(self.counts.get(key), now) for key, now in later.counts.items()}


class ImpactMeter:
    """Watches the last change, and sets its effect."""

    def __init__(self, window_s: float, fan_out: float = 0.0) -> None:
        self.follow(window_s, fan_out)
        self._older: _Reading | None = None
        self._newer: _Reading | None = None
        self._seen: Change | None = None
        self._over = False  # whether its window has passed
        # For the change in `_seen`: assignments/s of hosts before it, the counters at its end, and
        # the placement that it led to.
        self._before: dict[str, float] = {}
        self._ended: _Reading | None = None
        self._brought: Placement | None = None

    def follow(self, window_s: float, fan_out: float) -> None:
        """Measure like this from now on."""
        self._window_s = max(window_s, _LEAST_S)
        self._fan_out = fan_out

    def tick(
        self,
        last: Change | None,
        published: Placement | None,
        loads: LoadTracker,
        hosts: Sequence[PoolHost],
        now: float,
    ) -> None:
        """Advance by one tick; ``published`` is the placement that the last change led to."""
        if last is not self._seen:
            # A new change ends the measurement of the one before.
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
        """Return each host's assignments per second over the last one or two windows."""
        since = self._older or self._newer
        if since is None or now - since.at < _LEAST_S:
            return {}
        return since.assignments_per_s(_Reading.of(loads, now))

    def _close(self, loads: LoadTracker, hosts: Sequence[PoolHost], now: float) -> None:
        """End the measurement and set the effect, if there was enough time and load."""
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
            change.impact = ChangeImpact(
                seconds=now - ended.at,
                before=before,
                after=after,
                assignments_per_s_before=self._before,
                assignments_per_s_after=ended.assignments_per_s(reading),
            )
