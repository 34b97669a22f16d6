"""Recorded load: how many assignments each expert of a pool had, window by window.

`moesaic record` writes traces and `moesaic simulate` replays them; `src/moesaic/traces.py` has the
file format. A window is the difference of two readings of the controller's running totals. A new
controller starts its totals at zero, with a higher term. What routers counted between the last
reading and the end of its predecessor is lost, and no count becomes negative.

Shape suffixes: W = windows, E = experts of a layer, H = hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..expert_keys import LayerKey
from .meter import HostTimes
from .tracker import grown


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Counts of assignments and times of hosts in windows of equal length."""

    window_s: float
    counts: Mapping[LayerKey, np.ndarray]  # (W, E) int64 assignments of each layer
    hosts: tuple[str, ...]
    assignments_WH: np.ndarray  # (W, H) int64 assignments that hosts answered
    busy_s_WH: np.ndarray  # (W, H) float64 seconds of computing
    queued_s_WH: np.ndarray  # (W, H) float64 seconds that calls waited, summed over calls

    def __post_init__(self) -> None:
        windows = len(self.assignments_WH)
        wrong = [str(key) for key, found in self.counts.items() if len(found) != windows]
        if wrong or not self.window_s > 0:
            raise ValueError(
                f"trace: {windows} windows of {self.window_s} s, but other lengths in {wrong}"
            )

    @property
    def windows(self) -> int:
        return len(self.assignments_WH)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTotals:
    """The sums of all load reports that one controller received since its start."""

    term: int
    counts: Mapping[LayerKey, np.ndarray] = field(default_factory=dict)  # (E,) int64 each
    hosts: Mapping[str, HostTimes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Window:
    counts: Mapping[LayerKey, np.ndarray]
    hosts: Mapping[str, HostTimes]


class TraceRecorder:
    """Collects readings of the totals, and makes a trace of the windows between them."""

    def __init__(self, window_s: float, first: LoadTotals) -> None:
        self._window_s = window_s
        self._last = first
        self._windows: list[_Window] = []

    def add(self, totals: LoadTotals, windows: int = 1) -> None:
        """Add a reading that was taken ``windows`` windows after the last one.

        There are several if the controller was not reachable in between. They get even parts of
        what was counted.
        """
        before = self._last if self._last.term == totals.term else LoadTotals(term=totals.term)
        self._last = totals
        counts = {key: grown(before.counts.get(key), now) for key, now in totals.counts.items()}
        hosts = {h: now.since(before.hosts.get(h)) for h, now in totals.hosts.items()}
        for n in range(windows):
            self._windows.append(
                _Window(
                    {key: c * (n + 1) // windows - c * n // windows for key, c in counts.items()},
                    {host: times.part(n, windows) for host, times in hosts.items()},
                )
            )

    def trace(self) -> Trace:
        """Return the trace; layers and hosts that appeared later have zeros in earlier windows."""
        sizes: dict[LayerKey, int] = {}
        for window in self._windows:
            for key, found in window.counts.items():
                sizes[key] = max(sizes.get(key, 0), len(found))
        shape = len(self._windows)
        counts = {key: np.zeros((shape, size), dtype=np.int64) for key, size in sizes.items()}
        hosts = tuple(sorted({host for window in self._windows for host in window.hosts}))
        assignments_WH = np.zeros((shape, len(hosts)), dtype=np.int64)
        busy_s_WH, queued_s_WH = np.zeros((2, shape, len(hosts)))
        for w, window in enumerate(self._windows):
            for key, found in window.counts.items():
                counts[key][w, : len(found)] = found
            for h, host in enumerate(hosts):
                times = window.hosts.get(host, HostTimes())
                assignments_WH[w, h] = times.assignments
                busy_s_WH[w, h], queued_s_WH[w, h] = times.busy_s, times.queued_s
        return Trace(
            window_s=self._window_s,
            counts=dict(sorted(counts.items())),
            hosts=hosts,
            assignments_WH=assignments_WH,
            busy_s_WH=busy_s_WH,
            queued_s_WH=queued_s_WH,
        )
