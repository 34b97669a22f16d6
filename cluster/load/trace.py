"""Recorded load: what the experts of a pool were asked for, window by window.

`moesaic record` writes traces and `moesaic simulate` replays them; the file is written and read in
`src/moesaic/traces.py`. A trace comes of the controller's running totals, as their differences.
A controller that starts anew begins its totals at zero, under a higher term; what routers counted
between the last reading and its predecessor's end is lost, and no count is ever negative.

Shapes: W windows, E experts of a layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..placement import LayerKey
from .meter import HostTimes
from .tracker import grown


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Counts of choices, and what the hosts said of their work, of equally long windows."""

    window_s: float
    counts: Mapping[LayerKey, np.ndarray]  # (W, E) int64 choices of each layer
    hosts: tuple[str, ...]
    choices_WH: np.ndarray  # (W, H) int64 choices that hosts answered
    busy_s_WH: np.ndarray  # (W, H) float64 seconds of computing
    queued_s_WH: np.ndarray  # (W, H) float64 seconds that calls waited, summed up

    def __post_init__(self) -> None:
        windows = len(self.choices_WH)
        wrong = [str(key) for key, found in self.counts.items() if len(found) != windows]
        if wrong or not self.window_s > 0:
            raise ValueError(
                f"trace: {windows} windows of {self.window_s} s, but other lengths in {wrong}"
            )

    @property
    def windows(self) -> int:
        return len(self.choices_WH)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTotals:
    """Everything that one controller heard of the load since its start."""

    term: int
    counts: Mapping[LayerKey, np.ndarray] = field(default_factory=dict)  # (E,) int64 each
    hosts: Mapping[str, HostTimes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Window:
    counts: Mapping[LayerKey, np.ndarray]
    hosts: Mapping[str, HostTimes]


class Recorder:
    """Takes readings of the totals; gives the trace of the windows between them."""

    def __init__(self, window_s: float, first: LoadTotals) -> None:
        self._window_s = window_s
        self._last = first
        self._windows: list[_Window] = []

    def add(self, totals: LoadTotals, windows: int = 1) -> None:
        """The next reading, ``windows`` windows behind the last one: several when the controller
        was away in between; they share evenly in what was counted."""
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
        """Layers and hosts that appeared on the way have zeros before."""
        sizes: dict[LayerKey, int] = {}
        for window in self._windows:
            for key, found in window.counts.items():
                sizes[key] = max(sizes.get(key, 0), len(found))
        shape = len(self._windows)
        counts = {key: np.zeros((shape, size), dtype=np.int64) for key, size in sizes.items()}
        hosts = tuple(sorted({host for window in self._windows for host in window.hosts}))
        choices_WH = np.zeros((shape, len(hosts)), dtype=np.int64)
        busy_s_WH, queued_s_WH = np.zeros((2, shape, len(hosts)))
        for w, window in enumerate(self._windows):
            for key, found in window.counts.items():
                counts[key][w, : len(found)] = found
            for h, host in enumerate(hosts):
                times = window.hosts.get(host, HostTimes())
                choices_WH[w, h] = times.choices
                busy_s_WH[w, h], queued_s_WH[w, h] = times.busy_s, times.queued_s
        return Trace(
            window_s=self._window_s,
            counts=dict(sorted(counts.items())),
            hosts=hosts,
            choices_WH=choices_WH,
            busy_s_WH=busy_s_WH,
            queued_s_WH=queued_s_WH,
        )
