"""A router's connections to its hosts: they send frames and turn what arrives into events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from ...cluster.load.meter import HostPath
from ...cluster.load.router_counts import TransportMeter
from ...cluster.placement import HostEntry
from ...cluster.routing.events import HostDown, HostUp, Ponged, Refused, Replied, RouterEvent
from ...cluster.routing.transports import (
    Transport,
    TransportChoice,
    Transports,
    is_near,
    path_to,
)
from ...kernels.slabs.borrowed import borrow_any
from ...proto.errors import ClusterError, Corrupted, HostLost
from ...proto.expert_pb2 import Frame, Reply
from ...proto.keys import ClusterSecret
from ...proto.wire import CallLayout, checksum
from ..runtime.devices import device_name
from ..transport.base import Channel, InboundFrame, call_of
from ..transport.poller import Epoll, Poller
from ..transport.process_group import backends
from ..transport.seqpacket import close_all
from .connect import Connect, connect
from .layer_tensors import LayerTensors
from .lent_experts import LentExperts

log = logging.getLogger(__name__)


class HostConnections:
    """All channels of one router, polled together. Callers hold the router's lock, but in `wait`.

    A lost host never raises an exception here: it is reported as a `HostDown` event.
    """

    def __init__(
        self,
        *,
        router: str,
        node: str,
        transport: TransportChoice,
        slots: int,
        device: torch.device,
        secret: ClusterSecret,
        clock: Callable[[], float] = time.monotonic,
        borrower: LentExperts | None = None,
        connect: Connect = connect,
        poller: Poller | None = None,
        numa: int | None = None,
    ) -> None:
        """Check that this process can use ``transport``. Raises ClusterError if it cannot.

        ``borrower`` gets what hosts on the same device lend (None: they are asked for nothing).
        Without it hosts are not asked to lend. ``connect`` opens a connection, and ``poller`` waits
        for all of them (None: the system's). ``numa`` is the NUMA node that the process is pinned
        to; only hosts that are pinned to no other one are asked to lend.
        """
        if transport == "group" and not backends():
            raise ClusterError(
                "transport: 'group' needs torch.distributed, which this build of torch lacks; "
                "use 'grpc', which reaches the same hosts"
            )
        self._router = router
        self._node = node
        self._clock = clock
        self._secret = secret
        self._device = device
        self._borrower = borrower
        self._device_name = device_name(device)
        self._numa = numa
        self._choice = Transports(transport, node=node, device=device_name(device))
        self._used: dict[str, tuple[HostEntry, Transport]] = {}
        self._slots = slots
        self._channels: dict[str, Channel] = {}
        self._by_fd: dict[int, Channel] = {}
        self._max_rows: dict[str, int] = {}
        self._replies: dict[tuple[str, int], InboundFrame] = {}
        self._lost: list[HostDown] = []
        self._told: set[str] = set()  # hosts whose loss was logged since they were last there
        self.meter = TransportMeter()
        self._connect = connect
        self._poller = poller or Epoll()

    def close(self) -> None:
        for host in list(self._channels):
            self.disconnect(host)
        self._poller.close()

    def ring(self) -> None:
        """Wake up another thread that is waiting in `wait`."""
        self._poller.ring()

    # ---- connections ----------------------------------------------------------------------------

    def connect(self, entry: HostEntry) -> None:
        self.disconnect(entry.host)
        transport = self._choice.choose(entry, self._clock())
        self._used[entry.host] = entry, transport
        try:
            channel = self._connect(
                entry,
                transport,
                router=self._router,
                secret=self._secret,
                device=self._device,
                # One slot more than calls in flight: a reply's slot is released only after its
                # event was handled, and handling it may already send the next call.
                slots=self._slots + 1,
                borrows=self._borrower is not None
                and is_near(entry, self._numa)
                and entry.device == self._device_name,
            )
        except HostLost as lost:
            self._transport_lost(entry.host)
            self._down(entry.host, lost)
            return
        self._channels[entry.host] = self._by_fd[channel.fileno()] = channel
        self._poller.register(channel.fileno())

    def disconnect(self, host: str) -> None:
        self.meter.lost(host)
        channel = self._channels.pop(host, None)
        welcomed = self._max_rows.pop(host, None) is not None
        if channel is None:
            return
        if not welcomed:
            self._transport_lost(host)  # the host did not send Welcome in time
        for key in [key for key in self._replies if key[0] == host]:
            del self._replies[key]
        del self._by_fd[channel.fileno()]
        self._poller.unregister(channel.fileno())
        channel.close()

    def _down(self, host: str, reason: HostLost) -> None:
        # A host that stays away is tried again and again; one line says so.
        level = logging.DEBUG if host in self._told else logging.INFO
        self._told.add(host)
        log.log(
            level,
            "router %s: host %s: %s",
            self._router,
            host,
            reason,
            extra={"router": self._router, "host": host},
        )
        if host in self._channels:
            self._transport_lost(host)
        self.disconnect(host)
        self._lost.append(HostDown(host))

    def _transport_lost(self, host: str) -> None:
        entry, transport = self._used[host]
        self._choice.lost(entry, transport, self._clock())

    def paths(self, lenders: Collection[str]) -> tuple[HostPath, ...]:
        """Return how this router reaches each host; ``lenders`` have lent it their memory."""
        found = []
        for host, (entry, transport) in sorted(self._used.items()):
            connected = host in self._channels
            if not connected and host not in lenders:
                continue  # it may have left long ago
            found.append(
                path_to(
                    entry,
                    transport=transport if connected else None,
                    lent=host in lenders,
                    borrows=self._borrower is not None,
                    node=self._node,
                    device=self._device_name,
                    numa=self._numa,
                )
            )
        return tuple(found)

    @property
    def transports(self) -> dict[str, Transport]:
        """The transport in use for each connected host."""
        return {host: self._used[host][1] for host in list(self._channels)}

    def take_lost(self) -> list[HostDown]:
        """Return the hosts that were found to be lost since the last call of this method."""
        lost, self._lost = self._lost, []
        return lost

    @property
    def slot_bytes(self) -> int:
        """The bytes that one call may take on any of the connections."""
        return min((c.slot_bytes for c in self._channels.values()), default=1 << 20)

    @property
    def max_rows(self) -> int | None:
        """The rows that every host accepts in one call; None while no host is connected."""
        return min(self._max_rows.values(), default=None)

    def rows_per_call(self, tensors: LayerTensors) -> int:
        """Return how many rows fit in one call to any host. Raises CallError if none does."""
        return tensors.rows_per_call(self.slot_bytes, self.max_rows)

    # ---- out ------------------------------------------------------------------------------------

    def send(self, host: str, frame: Frame) -> None:
        """Send a frame without tensors; do nothing if the host is not connected."""
        if frame.HasField("cancel"):
            self.meter.cancelled(host, frame.cancel.seq)
        channel = self._channels.get(host)
        if channel is None:
            return
        try:
            channel.send(frame)
        except HostLost as lost:
            self._down(host, lost)

    def send_call(
        self, host: str, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]
    ) -> None:
        channel = self._channels.get(host)
        try:
            if channel is None:
                raise HostLost("there is no connection to it")
            channel.send_call(frame, layout, write)
            seq, transport = call_of(frame).seq, self._used[host][1]
            self.meter.sent(host, seq, transport, layout.call_bytes, self._clock())
        except HostLost as lost:
            self._down(host, lost)

    def free(self, host: str, seq: int) -> None:
        """Release a call's slot, as no answer to it is wanted or expected any more."""
        channel = self._channels.get(host)
        if channel is not None:
            channel.release(seq)

    # ---- in -------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> list[int]:
        """Wait up to ``timeout_s`` until hosts have sent something; return where, for `events`.

        One thread calls this, without the router's lock.
        """
        return self._poller.wait(timeout_s)

    def events(self, ready: Sequence[int]) -> Iterator[RouterEvent]:
        """Yield the events that have arrived there; connections may have changed since."""
        for fd in ready:
            if fd in self._by_fd:
                yield from self._hear(self._by_fd[fd])

    def _hear(self, channel: Channel) -> Iterator[RouterEvent]:
        try:
            arrived = channel.receive()
        except HostLost as lost:
            self._down(channel.host, lost)
            return
        for inbound in arrived:
            event = self._event(channel.host, inbound)
            if event is not None:
                yield event
            if isinstance(event, Replied):
                # The caller has copied the reply by now, or has given the call up.
                self._replies.pop((event.host, event.seq), None)
                if self._channels.get(event.host) is channel:
                    channel.release(event.seq)

    def reply(self, host: str, seq: int) -> tuple[Reply, Tensor]:
        """Return the reply to call ``seq``; valid only while its event is being handled."""
        inbound = self._replies[host, seq]
        assert inbound.payload is not None
        return inbound.frame.reply, inbound.payload

    def _event(self, host: str, inbound: InboundFrame) -> RouterEvent | None:
        frame = inbound.frame
        match frame.WhichOneof("kind"):
            case "reply":
                reply = frame.reply
                assert inbound.payload is not None
                if checksum(reply.seq, inbound.payload) != reply.checksum:
                    self.free(host, reply.seq)
                    self.meter.refused(host, reply.seq)
                    message = f"call {reply.seq}: the reply of {host} does not match its checksum"
                    log.warning(
                        "router %s: %s",
                        self._router,
                        message,
                        extra={"router": self._router, "host": host, "seq": reply.seq},
                    )
                    return Refused(host, reply.seq, Corrupted.__name__, message)
                self.meter.answered(host, reply.seq, reply.payload_bytes, self._clock())
                self._replies[host, reply.seq] = inbound
                others = tuple((one.expert, one.version) for one in reply.other_versions)
                return Replied(host, reply.seq, (reply.version, others))
            case "refusal":
                refusal = frame.refusal
                self.meter.refused(host, refusal.seq)
                return Refused(host, refusal.seq, refusal.code, refusal.message)
            case "pong":
                return Ponged(host, frame.pong.seq)
            case "welcome":
                self._max_rows[host] = max(1, frame.welcome.max_rows)
                self._told.discard(host)
                log.info(
                    "router %s: host %s accepts calls",
                    self._router,
                    host,
                    extra={
                        "router": self._router,
                        "host": host,
                        "transport": self._used[host][1],
                        "incarnation": frame.welcome.incarnation,
                    },
                )
                return HostUp(host, frame.welcome.incarnation)
            case "lend" if self._borrower is not None:
                self._borrow(host, self._borrower, inbound)
                return None
            case kind:
                close_all(inbound.descriptors)
                log.warning(
                    "router %s: host %s sent an unexpected frame of kind %r",
                    self._router,
                    host,
                    kind,
                    extra={"router": self._router, "host": host},
                )
                return None

    def _borrow(self, host: str, borrower: LentExperts, inbound: InboundFrame) -> None:
        (entry, _), model = self._used[host], inbound.frame.lend.model
        chunks = [(chunk.number, chunk.serial) for chunk in inbound.frame.lend.chunks]
        if chunks:
            borrower.take_chunks(entry, model, chunks, inbound.descriptors)
            return
        about = {"router": self._router, "host": host, "model": model}
        if not inbound.descriptors:
            log.info("router %s: host %s takes %s back", self._router, host, model, extra=about)
            borrower.take_slab(entry, model, None)
            return
        descriptor, *others = inbound.descriptors
        close_all(others)  # of a slab there is one
        try:
            slab = borrow_any(descriptor)
        except ValueError as error:
            log.warning(
                "router %s: host %s lends %s, but %s", self._router, host, model, error, extra=about
            )
            return
        log.info("router %s: host %s lends %s", self._router, host, model, extra=about)
        borrower.take_slab(entry, model, slab)
