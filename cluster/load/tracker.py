"""Load: what routers count, and what the controller makes of it.

A router counts each choice of a token once, when its layer's call begins: padding is no load, and
neither are retries. Of the hosts' answers it sums up how long calls queued and were computed.

Shape suffixes: E = experts of a layer, N = choices.
"""

from __future__ import annotations

import numpy as np

from ..placement import LayerKey
from .meter import HostTimes, LoadReport

# Over how many seconds rates are averaged: what happens now, lately, and usually.
HORIZONS_S = (10.0, 60.0, 600.0)
# A layer's traffic has shifted where so large a part of its choices goes elsewhere than lately,
# beside _NOISE times what chance alone makes of as many choices.
_SHIFTED = 0.05
_NOISE = 2.0
# How far ahead, in parts of the difference between now and lately, the forecast looks.
_TREND = 0.5


def _added(known: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """A new array: who was given the old one keeps its numbers."""
    same = known is not None and known.shape == counts.shape
    return known + counts if same else counts.astype(np.int64)


def grown(before: np.ndarray | None, now: np.ndarray) -> np.ndarray:
    """What has come to a total; a model of another form under the same name began at zero."""
    same = before is not None and before.shape == now.shape and bool((before <= now).all())
    return now - before if same else now


def has_shifted(counts_E: np.ndarray, known_E: np.ndarray) -> bool:
    """Whether choices come from another distribution than those ``known_E`` before: the total
    variation between both, against its mean if they did not (normal approximation)."""
    choices, known = float(counts_E.sum()), float(known_E.sum())
    if not choices or not known:
        return False
    distance = 0.5 * np.abs(counts_E / choices - known_E / known).sum()
    # By both together: experts that few choices have missed are not impossible.
    part_E = (counts_E + known_E) / (choices + known)
    chance = 0.5 * np.sqrt(2 / np.pi * part_E * (1 - part_E) * (1 / choices + 1 / known)).sum()
    return bool(distance > _SHIFTED + _NOISE * chance)


class LoadTracker:
    """The controller's view: rates of all routers together, over several horizons."""

    def __init__(self) -> None:
        self._counts: dict[LayerKey, np.ndarray] = {}
        self._rates: dict[LayerKey, np.ndarray] = {}  # (horizons, E) choices per second
        self._since: float | None = None
        self._ages_s: dict[LayerKey, np.ndarray] = {}  # (horizons,) of the past that rates know
        self.windows = 0  # that were closed and had choices in them
        self.shifted_at: float | None = None  # when the traffic of some layer became another
        # Since the start; nothing is ever taken out of them.
        self.totals: dict[LayerKey, np.ndarray] = {}
        self.hosts: dict[str, HostTimes] = {}

    def hear(self, report: LoadReport) -> None:
        for key, counts in report.counts.items():
            self._counts[key] = _added(self._counts.get(key), counts)
            self.totals[key] = _added(self.totals.get(key), counts)
        for host, times in report.hosts.items():
            self.hosts.setdefault(host, HostTimes()).add(times)

    def advance(self, now: float, *, least_s: float = 1.0) -> bool:
        """Close the window if it is ``least_s`` old; True if it was."""
        if self._since is None:
            self._since = now
        window_s = now - self._since
        if window_s < least_s:
            return False
        self._since = now
        for key in self._rates.keys() | self._counts.keys():
            counts = self._counts.get(key)
            rates = self._rates.get(key)
            if counts is None and rates is not None:
                counts = np.zeros(rates.shape[1], dtype=np.int64)
            assert counts is not None
            if rates is None or rates.shape[1] != counts.size:
                rates = np.zeros((len(HORIZONS_S), counts.size))
                self._ages_s[key] = np.zeros(len(HORIZONS_S))
            elif has_shifted(counts, rates[0] * min(self._ages_s[key][0], HORIZONS_S[0])):
                # What was before tells what is usual, and nothing about what is now.
                self._ages_s[key][:-1] = 0.0
                self.shifted_at = now
            self._ages_s[key] += window_s
            # Young averages are plain means.
            part = np.maximum(
                window_s / self._ages_s[key], 1 - np.exp(-window_s / np.array(HORIZONS_S))
            )
            rates += part[:, None] * (counts / window_s - rates)
            self._rates[key] = rates
        self.windows += bool(self._counts)
        self._counts = {}
        return True

    def rate(self, key: LayerKey, horizon: int = 0) -> np.ndarray | None:
        """(E,) choices per second over `HORIZONS_S[horizon]`; None before anything was counted."""
        rates = self._rates.get(key)
        return None if rates is None else rates[horizon]

    def forecast(self) -> dict[LayerKey, np.ndarray]:
        """(E,) choices per second of each layer, shortly: the trend of the last minute goes on,
        and what is rare now keeps a little of what it usually has."""
        return {
            key: np.maximum(rates[0] + _TREND * (rates[0] - rates[1]), 0.05 * rates[2])
            for key, rates in self._rates.items()
        }

    def choices_per_busy_s(self) -> float | None:
        """What one host computes in a second of work, in the mean over all; None if unknown."""
        busy_s = sum(times.busy_s for times in self.hosts.values())
        choices = sum(times.choices for times in self.hosts.values())
        return choices / busy_s if busy_s > 0 and choices else None
