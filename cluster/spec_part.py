"""What all parts of the spec are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .emulation import Emulation
from .spec_words import with_words

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Micros = Annotated[float, Field(ge=0, le=60e6, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1)] | Literal["auto"]
Address = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """A mapping of the spec: unknown keys fail, and each key has words."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra=with_words
    )


class EmulationSpec(Part):
    """A device, as a spec has it: microseconds for starting a batch, for each choice (a row and
    one of its experts), and for each expert whose weights the batch reads."""

    call_us: Micros = 0.0
    row_us: Micros = 0.0
    expert_us: Micros = 0.0

    @model_validator(mode="after")
    def _takes_time(self) -> EmulationSpec:
        if not self.call_us + self.row_us + self.expert_us > 0:
            raise ValueError("one of call_us, row_us and expert_us must be above 0")
        return self

    def emulation(self) -> Emulation:
        return Emulation(call_us=self.call_us, row_us=self.row_us, expert_us=self.expert_us)


class Resources(Part):
    """What one Ray actor asks for."""

    num_cpus: Amount = 1
    num_gpus: Amount = 0
    resources: dict[str, Amount] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
