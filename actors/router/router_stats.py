"""What a router has counted since its start, and how it sees its hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...cluster.placement import PlacementId
from ...cluster.routing.transports import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    calls: int
    rows: int
    retries: int
    ejections: int
    hedges: int  # sends that repeated a late one
    hedge_wins: int  # hedges that were answered before the send that they repeated
    rows_lost: int
    placement: PlacementId
    hosts: Mapping[str, str]  # their states
    transports: Mapping[str, Transport]  # of the hosts that are connected
