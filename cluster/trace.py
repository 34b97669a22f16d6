"""Recorded load: what the experts of a pool were asked for, window by window.

`moesaic record` writes traces and `moesaic simulate` replays them; the file is written and read in
`src/moesaic/traces.py`.

Shapes: W windows, E experts of a layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .placement import LayerKey


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
