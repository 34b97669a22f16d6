"""What operators see: how busy hosts are, which experts are hot, and where each one stands."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..load.tracker import HORIZONS_S, LoadTracker
from ..placement import LayerKey, LayerPlacement
from ..planner.plan import Wishes

# Rates are means over so many seconds, or over what there is.
_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounters:
    """What one incarnation of a host has done since its start."""

    incarnation: int
    calls: int
    rows: int
    busy_s: float


class HostRates:
    """Counters of hosts, read now and then, as rates."""

    def __init__(self) -> None:
        self._read: dict[str, deque[tuple[float, HostCounters]]] = {}

    def note(self, counters: Mapping[str, HostCounters], now: float) -> None:
        """A reading of all hosts that are known; others are forgotten."""
        for host in self._read.keys() - counters.keys():
            del self._read[host]
        for host, found in counters.items():
            read = self._read.setdefault(host, deque())
            if read and read[-1][1].incarnation != found.incarnation:
                read.clear()
            read.append((now, found))
            while len(read) > 2 and now - read[1][0] >= _WINDOW_S:
                read.popleft()

    def of(self, host: str) -> dict[str, float] | None:
        """Calls and rows per second, and the part of the time that its device was busy; None
        before there are two readings."""
        read = self._read.get(host, ())
        if len(read) < 2:
            return None
        (began, first), (ended, last) = read[0], read[-1]
        seconds = ended - began
        return {
            "calls_per_s": round((last.calls - first.calls) / seconds, 1),
            "rows_per_s": round((last.rows - first.rows) / seconds, 1),
            "busy": round((last.busy_s - first.busy_s) / seconds, 4),
        }


def hottest(
    rates: Mapping[LayerKey, np.ndarray],
    layers: Mapping[LayerKey, LayerPlacement],
    count: int,
) -> list[dict[str, Any]]:
    """The ``count`` experts with the most choices per second, and the hosts that they stand on."""
    each = (
        (float(rate), key, expert)
        for key, rate_E in rates.items()
        # No more than `count` of one layer can be among them.
        for expert in np.argsort(-rate_E, kind="stable")[:count].tolist()
        if (rate := rate_E[expert]) > 0
    )
    return [
        {
            "model": key.model,
            "layer": key.layer,
            "expert": expert,
            "choices_per_s": round(rate, 1),
            "hosts": list(layers[key].hosts(expert)) if key in layers else [],
        }
        for rate, key, expert in heapq.nlargest(count, each, key=lambda one: one[0])
    ]


def standing(
    layers: Mapping[LayerKey, LayerPlacement],
    loads: LoadTracker,
    wishes: Wishes,
    *,
    model: str | None = None,
    layer: int | None = None,
    hot: int | None = None,
) -> list[dict[str, Any]]:
    """Every expert of ``model`` and ``layer`` (None: of all): its replicas, its load and what
    operators wish for it, in the order of its key; with ``hot`` those with the most choices per
    second over the shortest horizon, the hottest first."""
    rows = [
        row
        for key in sorted(layers)
        if model in (None, key.model) and layer in (None, key.layer)
        for row in _layer_standing(key, layers[key], loads, wishes)
    ]
    if hot is None:
        return rows
    shortest = _horizon(HORIZONS_S[0])
    return heapq.nlargest(hot, rows, key=lambda row: row["choices_per_s"][shortest])


def _layer_standing(
    key: LayerKey, placed: LayerPlacement, loads: LoadTracker, wishes: Wishes
) -> list[dict[str, Any]]:
    none_E = np.zeros(len(placed.replicas))
    rates = [loads.rate(key, horizon) for horizon in range(len(HORIZONS_S))]
    rates = [none_E if rate_E is None or rate_E.size != none_E.size else rate_E for rate_E in rates]
    whole = float(rates[0].sum())
    return [
        {
            "model": key.model,
            "layer": key.layer,
            "expert": expert,
            "replicas": [
                {"host": replica.host, "share": round(replica.share, 4)} for replica in replicas
            ],
            "choices_per_s": {
                _horizon(seconds): round(float(rate_E[expert]), 1)
                for seconds, rate_E in zip(HORIZONS_S, rates, strict=True)
            },
            "layer_part": round(float(rates[0][expert]) / whole, 4) if whole else None,
            "least_replicas": wishes.least.get(key.expert(expert), 1),
            "pinned_to": sorted(wishes.pins.get(key.expert(expert), ())),
        }
        for expert, replicas in enumerate(placed.replicas)
    ]


def _horizon(seconds: float) -> str:
    return f"{seconds:g}s"
