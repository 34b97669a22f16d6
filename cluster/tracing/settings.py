"""What the spec says about traces, as each process of the cluster needs to know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """Where spans are sent, and which there are; see `TracesSpec`."""

    endpoint: str
    sample: float = 0.01
    follow_clients: bool = True
    slow_layer_ms: float = 20.0
    layers_per_request: int = 32

    @property
    def url(self) -> str:
        """The address to which spans are posted."""
        base = self.endpoint.rstrip("/")
        return base if base.endswith("/v1/traces") else f"{base}/v1/traces"

    @property
    def slow_layer_ns(self) -> int:
        return round(self.slow_layer_ms * 1e6)
