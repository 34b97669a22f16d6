"""How a simulated host gets experts: one order after the other, one expert after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...proto.errors import CheckpointError, HostLost, MoesaicError
from ..placement import ExpertKey, HostEntry
from .network import Responder

if TYPE_CHECKING:
    from .host import SimHost


class _Order(NamedTuple):
    keys: Sequence[ExpertKey]
    peers: Mapping[ExpertKey, HostEntry]  # the others come from the checkpoint
    respond: Responder


class Fetching:
    """The orders of one host. An expert that comes serves at once."""

    def __init__(self, host: SimHost) -> None:
        self.missing = 0  # experts of the order that is being carried out
        self._host = host
        self._orders: deque[_Order] = deque()

    def order(
        self, keys: Sequence[ExpertKey], peers: Mapping[ExpertKey, HostEntry], respond: Responder
    ) -> None:
        self._orders.append(_Order(keys, peers, respond))
        if len(self._orders) == 1:
            self._begin()

    def _begin(self) -> None:
        wanted = deque(key for key in self._orders[0].keys if not self._host.holds(key))
        self.missing = len(wanted)
        self._next(wanted)

    def _next(self, wanted: deque[ExpertKey]) -> None:
        if not wanted:
            self._end(None)
            return
        host, key = self._host, wanted.popleft()
        took_s, fails = host.world.faults.load(host.world.settings.load_s)

        def came() -> None:
            peer = self._orders[0].peers.get(key)
            if fails:
                self._end(CheckpointError(f"{key}: cannot be read"))
            elif peer is not None and not host.world.has_weights(peer, key):
                self._end(HostLost(f"{key}: {peer.host} does not give it"))
            else:
                host.put(key)
                self.missing -= 1
                self._next(wanted)

        host.reach(took_s, f"{host.name}: {key} comes", came)

    def _end(self, error: MoesaicError | None) -> None:
        self.missing = 0
        self._orders.popleft().respond(error)
        if self._orders:
            self._begin()
