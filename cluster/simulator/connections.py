"""The connections of a simulated router and their slots, as in `actors/router/connections.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...proto.errors import InternalError
from ..expert_keys import ExpertVersion
from ..placement import HostEntry
from ..routing.events import HostDown, Send
from ..versions import LayerVersions
from .network import CallFrame, Connection, Frame, Hello, Refusal, Reply
from .trace_events import Sent

if TYPE_CHECKING:
    from .router import SimCall, SimRouter
    from .world import World


class SimChannel:
    """The slots of one connection: a call takes one until it is answered."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.calls: dict[int, int] = {}  # seq -> slot
        self._free = list(range(len(connection.slots)))

    def take(self, seq: int) -> int:
        if not self._free:
            raise InternalError(f"{self.connection.name}: a call more than there are slots")
        slot = self.calls[seq] = self._free.pop()
        return slot

    def release(self, seq: int) -> None:
        slot = self.calls.pop(seq, None)
        if slot is not None:
            self._free.append(slot)


class SimConnections:
    """All channels of one router."""

    def __init__(self, router: SimRouter, world: World, *, slots: int) -> None:
        self.channels: dict[str, SimChannel] = {}
        self._router = router
        self._world = world
        self._slots = slots
        self._lost: list[HostDown] = []

    def connect(self, entry: HostEntry) -> None:
        self.disconnect(entry.host)
        host = self._world.hosts.get(entry.host)
        if host is None or not host.alive or host.incarnation != entry.incarnation:
            self._lost.append(HostDown(entry.host))
            return
        connection = self._world.network.connect(self._router, host, self._slots + 1)
        self.channels[entry.host] = SimChannel(connection)
        connection.send(host, Hello())

    def disconnect(self, host: str) -> None:
        channel = self.channels.pop(host, None)
        if channel is not None:
            channel.connection.close(by=self._router)

    def close(self) -> None:
        for host in list(self.channels):
            self.disconnect(host)

    def take_lost(self) -> list[HostDown]:
        lost, self._lost = self._lost, []
        return lost

    def down(self, host: str) -> None:
        self.disconnect(host)
        self._lost.append(HostDown(host))

    def send(self, host: str, frame: Frame) -> None:
        channel = self.channels.get(host)
        if channel is not None:
            channel.connection.send(channel.connection.host, frame)

    def send_call(self, send: Send, call: SimCall) -> None:
        channel = self.channels.get(send.host)
        if channel is None or not channel.connection.open:
            self.down(send.host)
            return
        connection, slot = channel.connection, channel.take(send.seq)
        owed = tuple(seq for seq, used in connection.unanswered.items() if used == slot)
        versions = LayerVersions(send.version, dict(send.other_versions))
        named = tuple(
            ExpertVersion(call.key.expert(expert), versions.of(expert))
            for expert in np.unique(send.ids_tk).tolist()
            if expert >= 0
        )
        self._world.tell(
            Sent(self._router, call, connection, send.seq, slot, send.placement_id, owed, named)
        )
        connection.unanswered[send.seq] = slot
        frame = CallFrame(
            seq=send.seq,
            slot=slot,
            key=call.key,
            number=send.placement_id,
            incarnation=send.incarnation,
            timeout_s=send.timeout_s,
            rows=len(send.token_t),
            attempt=send.attempt,
            version=send.version,
            other_versions=send.other_versions,
            ids_n=send.ids_tk.reshape(-1),
        )
        connection.send(connection.host, frame)

    def free(self, host: str, seq: int) -> None:
        """Release the slot of a call whose answer is neither wanted nor expected any more."""
        channel = self.channels.get(host)
        if channel is not None:
            channel.release(seq)

    def channel_of(self, connection: Connection) -> SimChannel | None:
        """Return the channel of a connection; None after a disconnect, to ignore late frames."""
        for channel in self.channels.values():
            if channel.connection is connection:
                return channel
        return None

    def received(self, channel: SimChannel, frame: Frame) -> bool:
        """Return whether a frame has to be handled: not if it is a repeated reply."""
        if isinstance(frame, Reply) and frame.seq not in channel.calls:
            return False
        if isinstance(frame, Refusal) or (isinstance(frame, Reply) and not frame.sound):
            channel.release(frame.seq)
        return True

    def read(self, host: str, seq: int) -> object:
        """Return the contents of the slot of a reply that is being handled."""
        channel = self.channels[host]
        return channel.connection.slots[channel.calls[seq]]
