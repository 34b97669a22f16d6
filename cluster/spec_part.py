"""What all parts of the spec are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .spec_words import with_words

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1)] | Literal["auto"]
Address = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """A mapping of the spec: unknown keys fail, and each key has words."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra=with_words
    )


class Resources(Part):
    """What one Ray actor asks for."""

    num_cpus: Amount = 1
    num_gpus: Amount = 0
    resources: dict[str, Amount] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
