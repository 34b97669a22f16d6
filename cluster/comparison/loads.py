"""Generate loads, as traces, on which placement strategies can be compared.

Shapes: W windows, E experts of a layer, D domains of traffic (code, chat, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..expert_keys import LayerKey
from ..load.trace import Trace
from ..placement import ModelShape

_DAY_S = 86_400.0


def drifting_trace(
    shapes: Sequence[ModelShape],
    *,
    sigma: float,
    drift: float,
    windows: int,
    window_s: float,
    assignments_per_s: float,
    rng: np.random.Generator,
) -> Trace:
    """Generate log-normal loads that drift from window to window, independently for each layer.

    The log of the loads is an autoregressive process of standard deviation ``sigma``:
    log-load' = sqrt(1 - drift^2) log-load + drift * noise. ``assignments_per_s``: of one layer.
    """
    counts = {}
    for key, experts in _layers(shapes):
        log_E = sigma * rng.normal(size=experts)
        rows = []
        for _ in range(windows):
            rows.append(np.exp(log_E))
            noise_E = sigma * rng.normal(size=experts)
            log_E = np.sqrt(1 - drift**2) * log_E + drift * noise_E
        load_WE = np.stack(rows)
        part_WE = load_WE / load_WE.sum(axis=1, keepdims=True)
        counts[key] = rng.poisson(part_WE * assignments_per_s * window_s)
    return _trace(counts, window_s, windows)


def daily_trace(
    shapes: Sequence[ModelShape],
    *,
    sigma: float,
    domains: int,
    windows: int,
    window_s: float,
    assignments_per_s: float,
    rng: np.random.Generator,
    swing: float = 0.3,
) -> Trace:
    """Generate traffic of several domains whose shares move smoothly over 24 hours.

    Each domain has its own hot experts (log-normal loads of deviation ``sigma``). The total load is
    a fraction ``swing`` above the mean at its peak, and as much below it twelve hours later.
    """
    time_W = np.arange(windows) * window_s
    phase_WD = 2 * np.pi * (time_W[:, None] / _DAY_S - np.arange(domains) / domains)
    share_WD = np.exp(1.5 * np.cos(phase_WD))
    share_WD /= share_WD.sum(axis=1, keepdims=True)
    total_W = assignments_per_s * window_s * (1 + swing * np.cos(2 * np.pi * time_W / _DAY_S))
    counts = {}
    for key, experts in _layers(shapes):
        load_DE = np.exp(sigma * rng.normal(size=(domains, experts)))
        load_DE /= load_DE.sum(axis=1, keepdims=True)
        counts[key] = rng.poisson(share_WD @ load_DE * total_W[:, None])
    return _trace(counts, window_s, windows)


def _layers(shapes: Sequence[ModelShape]) -> list[tuple[LayerKey, int]]:
    return [
        (LayerKey(shape.model, layer), experts)
        for shape in shapes
        for layer, experts in sorted(shape.experts.items())
    ]


def _trace(counts: dict[LayerKey, np.ndarray], window_s: float, windows: int) -> Trace:
    """Make a trace without hosts, since no pool has served these loads."""
    none_WH = np.zeros((windows, 0))
    return Trace(
        window_s=window_s,
        counts=counts,
        hosts=(),
        assignments_WH=none_WH.astype(np.int64),
        busy_s_WH=none_WH,
        queued_s_WH=none_WH,
    )
