"""The part of the spec that asks for the router service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .merging import MergePolicy
from .spec_part import Address, Part, Seconds

Megabytes = Annotated[float, Field(ge=0.001, le=1024)]


class RouterSpec(Part):
    """The gRPC service for clients that bring hidden states; port 0 takes a free one.

    One call may have ``max_call_mb`` of tensors and take ``call_s`` seconds; ``max_calls`` calls
    and ``max_mb`` of tensors and answers are held at a time. Calls of one layer are merged up to
    ``max_batch_rows``.
    """

    host: Address = "127.0.0.1"
    port: int = Field(default=8001, ge=0, le=65_535)
    max_batch_rows: int = Field(default=1024, ge=1, le=1 << 20)
    max_calls: int = Field(default=256, ge=1, le=4096)
    max_mb: float = Field(default=256.0, ge=0.002, le=1 << 16, allow_inf_nan=False)
    max_call_mb: Megabytes = 64.0
    call_s: Seconds = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> RouterSpec:
        if 2 * self.max_call_mb > self.max_mb:
            raise ValueError("2 * max_call_mb <= max_mb must hold: a call's answer counts, too")
        return self

    @property
    def max_call_bytes(self) -> int:
        return int(self.max_call_mb * 1e6)

    @property
    def policy(self) -> MergePolicy:
        return MergePolicy(
            max_batch_rows=self.max_batch_rows,
            max_calls=self.max_calls,
            max_bytes=int(self.max_mb * 1e6),
        )
