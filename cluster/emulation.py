"""Devices that are not there: how long one would take for a batch.

For experiments with more hosts than cores. Transport, queues and failures stay real; the
arithmetic is done, and the rest of the device's time is waited (`actors/device.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from .spec_part import Part

Micros = Annotated[float, Field(ge=0, le=60e6, allow_inf_nan=False)]


class Emulation(Part):
    """A device, as a spec has it: microseconds for starting a batch, for each choice (a row and
    one of its experts), and for each expert whose weights the batch reads."""

    call_us: Micros = 0.0
    row_us: Micros = 0.0
    expert_us: Micros = 0.0

    @model_validator(mode="after")
    def _takes_time(self) -> Emulation:
        if not self.call_us + self.row_us + self.expert_us > 0:
            raise ValueError("one of call_us, row_us and expert_us must be above 0")
        return self

    def batch_s(self, ids: Sequence[np.ndarray]) -> float:
        """Seconds for the calls of one batch with these choices; -1 is none."""
        used_N = np.concatenate([one.reshape(-1) for one in ids])
        used_N = used_N[used_N >= 0]
        touched = np.unique(used_N).size
        return 1e-6 * (self.call_us + self.row_us * used_N.size + self.expert_us * touched)
