"""Views for operators: how busy hosts are, which experts are hot, and which hosts hold them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..expert_keys import LayerKey
from ..load.tracker import HORIZONS_S, LoadTracker
from ..placement import LayerPlacement
from ..planner.plan import OperatorConstraints
from ..reports.activity import (
    AssignmentRates,
    ExpertReport,
    HostThroughput,
    HotExpert,
    ReplicaReport,
)

# Rates are means over so many seconds, or over the time since the first reading.
_WINDOW_S = 5.0
# The fields of `AssignmentRates`, a horizon each.
_RATES = tuple(f"over_{seconds:g}_s" for seconds in HORIZONS_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounters:
    """Counters of one incarnation of a host since its start."""

    incarnation: int
    calls: int
    rows: int
    busy_s: float


class HostRates:
    """Turns readings of the hosts' counters into rates."""

    def __init__(self) -> None:
        self._read: dict[str, deque[tuple[float, HostCounters]]] = {}

    def note(self, counters: Mapping[str, HostCounters], now: float) -> None:
        """Take in a reading of all known hosts; forget all others."""
        for host in self._read.keys() - counters.keys():
            del self._read[host]
        for host, found in counters.items():
            read = self._read.setdefault(host, deque())
            if read and read[-1][1].incarnation != found.incarnation:
                read.clear()
            read.append((now, found))
            while len(read) > 2 and now - read[1][0] >= _WINDOW_S:
                read.popleft()

    def of(self, host: str) -> HostThroughput | None:
        """Return what a host does a second; None before there are two readings."""
        read = self._read.get(host, ())
        if len(read) < 2:
            return None
        (began, first), (ended, last) = read[0], read[-1]
        seconds = ended - began
        return HostThroughput(
            calls_per_s=round((last.calls - first.calls) / seconds, 1),
            rows_per_s=round((last.rows - first.rows) / seconds, 1),
            busy_fraction=round((last.busy_s - first.busy_s) / seconds, 4),
        )


def hottest(
    rates: Mapping[LayerKey, np.ndarray],
    layers: Mapping[LayerKey, LayerPlacement],
    count: int,
) -> list[HotExpert]:
    """Return the ``count`` experts with the most assignments/s, and the hosts that hold them."""
    each = (
        (float(rate), key, expert)
        for key, rate_E in rates.items()
        # At most `count` experts of one layer can be among them.
        for expert in np.argsort(-rate_E, kind="stable")[:count].tolist()
        if (rate := rate_E[expert]) > 0
    )
    return [
        HotExpert(
            model=key.model,
            layer=key.layer,
            expert=expert,
            assignments_per_s=round(rate, 1),
            hosts=list(layers[key].hosts(expert)) if key in layers else [],
        )
        for rate, key, expert in heapq.nlargest(count, each, key=lambda one: one[0])
    ]


def expert_views(
    layers: Mapping[LayerKey, LayerPlacement],
    loads: LoadTracker,
    constraints: OperatorConstraints,
    *,
    model: str | None = None,
    layer: int | None = None,
    hot: int | None = None,
) -> list[ExpertReport]:
    """Return each expert's replicas, load and constraints, for ``model`` and ``layer`` (None: all).

    In the order of their keys. With ``hot``, only so many experts: those with the most assignments
    per second over the shortest horizon, the hottest first.
    """
    rows = [
        row
        for key in sorted(layers)
        if model in (None, key.model) and layer in (None, key.layer)
        for row in _layer_standing(key, layers[key], loads, constraints)
    ]
    if hot is None:
        return rows
    return heapq.nlargest(hot, rows, key=lambda row: row.assignments_per_s.over_10_s)


def _layer_standing(
    key: LayerKey, placed: LayerPlacement, loads: LoadTracker, constraints: OperatorConstraints
) -> list[ExpertReport]:
    none_E = np.zeros(len(placed.replicas))
    rates = [loads.rate(key, horizon) for horizon in range(len(HORIZONS_S))]
    rates = [none_E if rate_E is None or rate_E.size != none_E.size else rate_E for rate_E in rates]
    whole = float(rates[0].sum())
    rounded = [np.round(rate_E, 1).tolist() for rate_E in rates]
    return [
        ExpertReport(
            model=key.model,
            layer=key.layer,
            expert=expert,
            replicas=[
                ReplicaReport(host=replica.host, share=round(replica.share, 4))
                for replica in replicas
            ],
            assignments_per_s=AssignmentRates(
                **{name: each[expert] for name, each in zip(_RATES, rounded, strict=True)}
            ),
            share_of_layer=round(float(rates[0][expert]) / whole, 4) if whole else None,
            min_replicas=constraints.min_replicas.get(key.expert(expert), 1),
            pinned_to=sorted(constraints.pins.get(key.expert(expert), ())),
        )
        for expert, replicas in enumerate(placed.replicas)
    ]
