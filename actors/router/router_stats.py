"""What a router has counted since its start, and how it sees its hosts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cluster.expert_keys import LayerKey
from ...cluster.load.meter import LoadMeter
from ...cluster.load.router_counts import RouterCounts, TransportCounts
from ...cluster.placement import PlacementId
from ...cluster.routing.dispatch import Dispatcher
from ...cluster.routing.transports import Transport
from .lent_part import LayerReach


class CallCounts:
    """What a router has counted of its calls; used under its lock, except for `note`."""

    def __init__(self, meter: LoadMeter) -> None:
        self.calls = 0
        self.rows = 0
        self.lent = 0  # assignments that the router computed itself, with experts that hosts lent
        self._meter = meter
        self._reported = RouterCounts()
        self._noted: deque[tuple[LayerKey, np.ndarray, int, np.ndarray]] = deque()
        # Of calls on a device, by layer: how often each expert was chosen, and unused assignments.
        self._on_device: dict[LayerKey, Tensor] = {}
        self._tokens: deque[int] = deque()  # of each of those calls

    def note(self, key: LayerKey, reach: LayerReach, place_TK: np.ndarray) -> int:
        """Note a call that was computed at once, and return how many are noted and not counted.

        Counting many together takes a fifth of the time: code that runs once in a layer is not in
        the caches.
        """
        # The reach itself would keep what hosts have lent.
        self._noted.append((key, reach.expert_at, reach.count, place_TK))
        return len(self._noted)

    def note_on_device(self, key: LayerKey, ids_TK: Tensor, experts: int) -> None:
        """Count a call on the device where its ids are, without waiting for it."""
        counts = self._on_device.get(key)
        if counts is None or counts.shape[0] != experts + 1:
            counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids_TK.device)
            self._on_device[key] = counts
        ids_N = ids_TK.reshape(-1).long()
        ids_N = ids_N.where((ids_N >= 0) & (ids_N < experts), experts)
        counts.scatter_add_(0, ids_N, torch.ones_like(ids_N))
        self._tokens.append(ids_TK.shape[0])

    def count_noted(self) -> None:
        while self._tokens:
            self.calls += 1
            self.rows += self._tokens.popleft()
        for key, counts in list(self._on_device.items()):
            found = counts.clone()
            counts.sub_(found)  # calls may go on
            times_E = found[:-1].cpu().numpy()
            if times_E.any():
                self.count_lent(key, np.repeat(np.arange(len(times_E)), times_E), len(times_E))
        while self._noted:
            key, expert_at, experts, place_TK = self._noted.popleft()
            self.calls += 1
            self.rows += place_TK.shape[0]
            self.count_lent(key, expert_at[place_TK.reshape(-1)], experts)

    def count_lent(self, key: LayerKey, ids_n: np.ndarray, experts: int) -> None:
        """Count assignments that were computed here, all of whose ids are in [0, experts)."""
        self.lent += ids_n.size
        self._meter.count_used(key, ids_n, experts)

    def take(
        self, dispatcher: Dispatcher, lost_rows: int, transports: Mapping[str, TransportCounts]
    ) -> RouterCounts:
        """Return everything since the last report; ``transports`` have counts of that time.

        Calls that are only noted are counted first, with their load.
        """
        self.count_noted()
        now = RouterCounts(
            calls=self.calls,
            rows=self.rows,
            lent_assignments=self.lent,
            retries=dispatcher.retries,
            ejections=dispatcher.ejections,
            hedges=dispatcher.hedges,
            hedge_wins=dispatcher.hedge_wins,
            lost_rows=lost_rows,
            transports=transports,
        )
        before, self._reported = self._reported, now
        return now.since(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    calls: int
    rows: int
    lent: int
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
        counts: CallCounts,
        *,
        rows_lost: int,
        transports: Mapping[str, Transport],
    ) -> RouterStats:
        placement = dispatcher.placement
        return cls(
            calls=counts.calls,
            rows=counts.rows,
            lent=counts.lent,
            retries=dispatcher.retries,
            ejections=dispatcher.ejections,
            hedges=dispatcher.hedges,
            hedge_wins=dispatcher.hedge_wins,
            rows_lost=rows_lost,
            placement=PlacementId(0, 0) if placement is None else placement.id,
            hosts={name: host.state.value for name, host in list(dispatcher.hosts.items())},
            transports=transports,
        )
