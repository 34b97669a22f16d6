"""The key `monitoring` of the spec."""

from __future__ import annotations

from pydantic import Field

from .parts import Address, Part


class MonitoringSpec(Part):
    """The address of the page, `/status` and `/metrics`, on the machine of the endpoint."""

    host: Address = "127.0.0.1"
    """Address on which the page, `/status` and `/metrics` are served. `127.0.0.1` (default): only
    programs on the endpoint's machine can read them."""

    port: int = Field(default=8002, ge=0, le=65_535)
    """Port on which they are served. 0: any free port."""

    hot_experts: int = Field(default=20, ge=0, le=1000)
    """Number of experts that have series of their own in `/metrics`: those with the most load. An
    expert that is not among them any more takes its series with it."""
