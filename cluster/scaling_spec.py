"""The parts of the spec that say how many hosts there may be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .autoscaler import ScalePolicy
from .spec_part import Part

Busy = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Cost = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class AutoscaleSpec(Part):
    """When hosts come and go, in groups whose ``min_count`` and ``max_count`` differ.

    ``high`` and ``low`` are parts of the time in which hosts compute. A host that is not up after
    ``pending_s`` is shown as waiting for a machine.
    """

    high: Busy = 0.75
    low: Busy = 0.35
    up_after_s: Seconds = 15.0
    down_after_s: Seconds = 120.0
    cooldown_s: Seconds = 60.0
    pending_s: Seconds = 120.0
    max_cost_per_hour: Cost | None = None

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleSpec:
        if self.low >= self.high:
            raise ValueError("low < high must hold")
        return self

    @property
    def policy(self) -> ScalePolicy:
        return ScalePolicy(
            high=self.high,
            low=self.low,
            up_after_s=self.up_after_s,
            down_after_s=self.down_after_s,
            cooldown_s=self.cooldown_s,
            max_cost_per_hour=self.max_cost_per_hour,
        )
