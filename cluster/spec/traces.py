"""The part of the spec about traces."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ..tracing.settings import TraceSettings
from .parts import Part


class TracesSpec(Part):
    """Traces of requests, in OpenTelemetry's format (docs/traces.md)."""

    endpoint: str | None = None
    """Address of the collector that gets spans over OTLP/HTTP, such as `http://127.0.0.1:4318`. All
    machines of the cluster have to reach it. Default `null`: no request is traced."""

    sample: float = Field(default=0.01, ge=0, le=1)
    """Share of requests that are traced, of those whose client has not decided it."""

    follow_clients: bool = True
    """Whether a request with a `traceparent` header belongs to its client's trace, and is traced if
    the header says so. `false`: such headers are ignored, and `sample` decides."""

    slow_layer_ms: Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)] = 20.0
    """Milliseconds from which on the call of an experts' layer is slow. A traced request has spans
    for its slow layers, and for the hosts that computed them."""

    layers_per_request: int = Field(default=32, ge=0, le=1024)
    """Largest number of slow layers for which one request has spans."""

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError(
                f"{value!r} is not an address like http://127.0.0.1:4318; a collector's password "
                "goes into OTEL_EXPORTER_OTLP_HEADERS"
            )
        return value

    @property
    def settings(self) -> TraceSettings | None:
        """What processes have to know; None: nothing is traced."""
        if self.endpoint is None:
            return None
        return TraceSettings(**self.model_dump())
