"""Emulated devices: how long a batch would take on another device.

They are for experiments with more hosts than cores. Transport, queues, failures and the arithmetic
stay real; the host then waits for the rest of the device's time (`actors/host/device.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """The time that an emulated device takes for a batch, in microseconds."""

    call_us: float = 0.0  # to start a batch
    row_us: float = 0.0  # for each assignment (a row and one of its experts)
    expert_us: float = 0.0  # for each expert whose weights the batch reads

    def batch_s(self, ids: Sequence[np.ndarray]) -> float:
        """Return the seconds for one batch; ``ids`` are its calls' expert ids, -1 for padding."""
        used_N = np.concatenate([one.reshape(-1) for one in ids])
        used_N = used_N[used_N >= 0]
        touched = np.unique(used_N).size
        return 1e-6 * (self.call_us + self.row_us * used_N.size + self.expert_us * touched)
