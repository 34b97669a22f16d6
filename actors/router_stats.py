"""What a router has done so far."""

from __future__ import annotations

from dataclasses import dataclass

from ..cluster.placement import Number
from ..cluster.transports import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    calls: int
    rows: int
    retries: int
    ejections: int
    hedges: int  # sends that repeated a late one,
    overtakings: int  # and were answered before it
    rows_lost: int
    placement: Number
    hosts: dict[str, str]
    transports: dict[str, Transport]  # of the hosts that are connected
