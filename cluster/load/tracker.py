"""The controller's view of the load: rates, shifts and forecasts from the routers' counts.

Rates are exponential moving averages over several horizons. The forecast, which placements are
planned for, extrapolates them.

Shape suffixes: E = experts of a layer.
"""

from __future__ import annotations

import numpy as np

from ..expert_keys import LayerKey
from .meter import HostTimes, LoadReport
from .router_counts import RouterCounts

# Time constants of the averages: the load now, in the last minute, and usually.
HORIZONS_S = (10.0, 60.0, 600.0)
# A layer's traffic has shifted if the distance between its old and new distribution is larger than
# _SHIFTED plus _NOISE times the mean distance of two samples of the same distribution.
_SHIFTED = 0.05
_NOISE = 2.0
# The forecast adds this fraction of the difference between the two shorter averages.
_TREND = 0.5


def _added(known: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """Return the sum as a new array, as others may still hold the old one."""
    same = known is not None and known.shape == counts.shape
    return known + counts if same else counts.astype(np.int64)


def grown(before: np.ndarray | None, now: np.ndarray) -> np.ndarray:
    """Return what was added to a total.

    If the shape differs or a count fell, another model took the name, and its total began at zero.
    """
    same = before is not None and before.shape == now.shape and bool((before <= now).all())
    return now - before if same else now


def has_shifted(counts_E: np.ndarray, known_E: np.ndarray) -> bool:
    """Return whether assignments come from another distribution over experts than ``known_E``.

    It compares the total variation distance of the two samples with its mean for two samples of
    one distribution.
    """
    assignments, known = float(counts_E.sum()), float(known_E.sum())
    if not assignments or not known:
        return False
    distance = 0.5 * np.abs(counts_E / assignments - known_E / known).sum()
    # Probability of each expert, estimated from both samples, so that an expert without assignments
    # in a small sample does not count as impossible.
    part_E = (counts_E + known_E) / (assignments + known)
    # Under one distribution the difference of the two frequencies of an expert is about normal with
    # variance p (1 - p) (1/n + 1/m). The mean of |X| for a normal X is sqrt(2/pi) times its
    # standard deviation; half the sum over experts is the mean distance.
    chance = 0.5 * np.sqrt(2 / np.pi * part_E * (1 - part_E) * (1 / assignments + 1 / known)).sum()
    return bool(distance > _SHIFTED + _NOISE * chance)


class LoadTracker:
    """Rates of all routers together, averaged over several horizons."""

    def __init__(self) -> None:
        self._counts: dict[LayerKey, np.ndarray] = {}
        self._rates: dict[LayerKey, np.ndarray] = {}  # (horizons, E) assignments per second
        self._since: float | None = None
        self._ages_s: dict[LayerKey, np.ndarray] = {}  # (horizons,) seconds that each rate covers
        self.windows = 0  # closed windows with assignments in them
        self.shifted_at: float | None = None  # when the traffic of some layer last shifted
        # Sums since the start; they only grow.
        self.totals: dict[LayerKey, np.ndarray] = {}
        self.hosts: dict[str, HostTimes] = {}
        self.routers = RouterCounts()

    def hear(self, report: LoadReport) -> None:
        for key, counts in report.counts.items():
            self._counts[key] = _added(self._counts.get(key), counts)
            self.totals[key] = _added(self.totals.get(key), counts)
        for host, times in report.hosts.items():
            self.hosts.setdefault(host, HostTimes()).add(times)
        self.routers.add(report.router_counts)

    def forget(self, model: str) -> None:
        """Forget the load of a model that is not served any more."""
        for known in (self._counts, self._rates, self._ages_s, self.totals):
            for key in [key for key in known if key.model == model]:
                del known[key]

    def advance(self, now: float, *, least_s: float = 1.0) -> bool:
        """Close the window if it is at least ``least_s`` old; return whether it was."""
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
                # (The rates times the seconds that they cover are the known sample's counts.)
                # The shorter averages start anew; the longest goes on, as it is the usual load.
                self._ages_s[key][:-1] = 0.0
                self.shifted_at = now
            self._ages_s[key] += window_s
            # Weight of this window (horizons,): that of an exponential moving average, but at least
            # window / age, which makes an average younger than its horizon a plain mean.
            part = np.maximum(
                window_s / self._ages_s[key], 1 - np.exp(-window_s / np.array(HORIZONS_S))
            )
            rates += part[:, None] * (counts / window_s - rates)
            self._rates[key] = rates
        self.windows += bool(self._counts)
        self._counts = {}
        return True

    def rate(self, key: LayerKey, horizon: int = 0) -> np.ndarray | None:
        """Return (E,) assignments per second over `HORIZONS_S[horizon]`; None if none came yet."""
        rates = self._rates.get(key)
        return None if rates is None else rates[horizon]

    def forecast(self) -> dict[LayerKey, np.ndarray]:
        """Return the expected (E,) assignments per second of each layer in the near future.

        The trend of the last minute continues. Each expert gets at least 5 % of its usual rate, so
        that one that is rare at the moment is not forgotten.
        """
        return {
            key: np.maximum(rates[0] + _TREND * (rates[0] - rates[1]), 0.05 * rates[2])
            for key, rates in self._rates.items()
        }

    def assignments_per_busy_s(self, backward_s: float = 0.0) -> float | None:
        """Return assignments per second of computing, the mean of all hosts; None if unknown.

        ``backward_s`` is how long the backward halves of these assignments took.
        """
        busy_s = sum(times.busy_s for times in self.hosts.values()) + backward_s
        assignments = sum(times.assignments for times in self.hosts.values())
        return assignments / busy_s if busy_s > 0 and assignments else None
