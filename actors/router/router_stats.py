"""What a router has counted since its start, and how it sees its hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...cluster.placement import PlacementId
from ...cluster.routing.dispatch import Dispatcher
from ...cluster.routing.transports import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    calls: int
    rows: int
    lent: int  # assignments that the router computed itself, with experts that hosts lent
    retries: int
    ejections: int
    hedges: int  # sends that repeated a late one
    hedge_wins: int  # hedges that were answered before the send that they repeated
    rows_lost: int
    placement: PlacementId
    hosts: Mapping[str, str]  # their states
    transports: Mapping[str, Transport]  # of the hosts that are connected

    @classmethod
    def of(
        cls,
        dispatcher: Dispatcher,
        *,
        calls: int,
        rows: int,
        lent: int,
        rows_lost: int,
        transports: Mapping[str, Transport],
    ) -> RouterStats:
        placement = dispatcher.placement
        return cls(
            calls=calls,
            rows=rows,
            lent=lent,
            retries=dispatcher.retries,
            ejections=dispatcher.ejections,
            hedges=dispatcher.hedges,
            hedge_wins=dispatcher.hedge_wins,
            rows_lost=rows_lost,
            placement=PlacementId(0, 0) if placement is None else placement.id,
            hosts={name: host.state.value for name, host in list(dispatcher.hosts.items())},
            transports=transports,
        )
