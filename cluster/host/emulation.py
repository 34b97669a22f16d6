"""Devices that are not there: how long one would take for a batch.

For experiments with more hosts than cores. Transport, queues and failures stay real; the
arithmetic is done, and the rest of the device's time is waited (`actors/host/device.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """A device: microseconds for starting a batch, for each choice (a row and one of its experts),
    and for each expert whose weights the batch reads."""

    call_us: float = 0.0
    row_us: float = 0.0
    expert_us: float = 0.0

    def batch_s(self, ids: Sequence[np.ndarray]) -> float:
        """Seconds for the calls of one batch with these choices; -1 is none."""
        used_N = np.concatenate([one.reshape(-1) for one in ids])
        used_N = used_N[used_N >= 0]
        touched = np.unique(used_N).size
        return 1e-6 * (self.call_us + self.row_us * used_N.size + self.expert_us * touched)
