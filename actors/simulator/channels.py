"""The simulated transport: both ends of connections with shared slots, as `actors/transport/` has.

A host writes an answer into its slot when it has computed it, which is later than it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertVersion, LayerKey
from ...cluster.placement import PlacementId
from ...cluster.versions import LayerVersions
from ...proto.errors import HostLost, InternalError
from ...proto.expert_pb2 import Call, Frame
from ...proto.wire import CallLayout
from ..transport.base import InboundFrame, Session, check_slot, lend_frame
from .network import SLOT_BYTES, Connection, Descriptor, Network, Parcel
from .trace_events import Sent, Wrote


class SimFile(Protocol):
    """What a descriptor of a simulated process stands for."""

    def fileno(self) -> int: ...

    @property
    def readable(self) -> bool: ...


class SimPoller:
    """The descriptors that a simulated process waits for; it never waits itself."""

    def __init__(self) -> None:
        self._files: dict[int, SimFile] = {}  # by their numbers; made known before `register`
        self._registered: dict[int, None] = {}

    def know(self, file: SimFile) -> None:
        self._files[file.fileno()] = file

    def register(self, fd: int) -> None:
        self._registered[fd] = None

    def unregister(self, fd: int) -> None:
        self._registered.pop(fd, None)
        self._files.pop(fd, None)

    @property
    def readable(self) -> bool:
        """Whether anything has arrived."""
        return any(fd in self._registered and f.readable for fd, f in self._files.items())

    def wait(self, timeout_s: float) -> list[int]:
        """Return what is readable now; of real descriptors, such as mailboxes, it returns all."""
        files = self._files
        return [fd for fd in self._registered if fd not in files or files[fd].readable]

    def ring(self) -> None:
        """Do nothing: no thread waits."""

    def close(self) -> None:
        self._registered.clear()


class _End:
    """What one end of a connection has received."""

    def __init__(self, connection: Connection, network: Network) -> None:
        self.connection = connection
        self._fd = next(network.descriptors)
        self._arrived: deque[Parcel] = deque()
        self._ended = False

    def fileno(self) -> int:
        return self._fd

    @property
    def slot_bytes(self) -> int:
        return SLOT_BYTES

    @property
    def readable(self) -> bool:
        return bool(self._arrived) or self._ended

    def put(self, parcel: Parcel) -> None:
        self._arrived.append(parcel)

    def end(self) -> None:
        self._ended = True

    def _take(self) -> list[Parcel]:
        if not self._arrived and self._ended:
            raise HostLost(f"{self.connection.name} has ended")
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def _check(self) -> None:
        if not self.connection.open:
            raise HostLost(f"{self.connection.name} has ended")


class SimChannel(_End):
    """A router's end: a call takes a slot until it is answered."""

    def __init__(self, connection: Connection, network: Network) -> None:
        super().__init__(connection, network)
        self.host = connection.host.host
        self.calls: dict[int, tuple[int, int]] = {}  # seq -> (slot, size of the answer)
        self._free = list(range(len(connection.slots)))
        connection.channel = self

    def send_call(self, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]) -> None:
        check_slot(layout, SLOT_BYTES)
        self._check()
        if not self._free:
            raise InternalError(f"{self.connection.name}: a call more than there are slots")
        connection, call, slot = self.connection, frame.call, self._free[-1]
        write(connection.slots[slot])
        self._free.pop()
        self.calls[call.seq] = slot, layout.reply_bytes
        call.slot = slot
        payload = connection.slots[slot][: call.payload_bytes]
        owed = tuple(seq for seq, used in connection.unanswered.items() if used == slot)
        _, ids_TK, _ = layout.call_tensors(payload)
        connection.router.world.tell(
            Sent(
                connection.router,
                connection,
                call.seq,
                slot,
                PlacementId(call.term, call.epoch),
                owed,
                named_by(call, ids_TK),
            )
        )
        connection.unanswered[call.seq] = slot
        connection.send(connection.host, Parcel(frame, payload))

    def send(self, frame: Frame) -> None:
        self._check()
        self.connection.send(self.connection.host, Parcel(frame))

    def receive(self) -> list[InboundFrame]:
        return [one for one in map(self._read, self._take()) if one is not None]

    def _read(self, parcel: Parcel) -> InboundFrame | None:
        frame = parcel.frame
        match frame.WhichOneof("kind"):
            case "reply":
                slot, size = self.calls.get(frame.reply.seq, (None, 0))
                if slot is None:
                    return None  # the call was answered before, or given up
                return InboundFrame(frame, _answer_in(self.connection.slots[slot], size))
            case "refusal":
                self.release(frame.refusal.seq)
        descriptor = parcel.descriptor
        return InboundFrame(frame, descriptors=() if descriptor is None else (descriptor.take(),))

    def release(self, seq: int) -> None:
        slot, _ = self.calls.pop(seq, (None, 0))
        if slot is not None:
            self._free.append(slot)

    def close(self) -> None:
        self.connection.channel = None
        self.connection.close(by=self.connection.router)


class SimSession(_End):
    """A host's end of a connection to another machine, which carries no descriptors."""

    def __init__(self, connection: Connection, network: Network) -> None:
        super().__init__(connection, network)
        self.router = connection.router.name
        self._slots: dict[int, int] = {}  # seq -> slot of the calls that are being computed

    def receive(self) -> list[InboundFrame]:
        return [InboundFrame(parcel.frame, parcel.payload) for parcel in self._take()]

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        self._slots[frame.call.seq] = frame.call.slot
        return torch.empty(layout.reply_bytes, dtype=torch.uint8)

    def send_reply(self, frame: Frame, buffer: Tensor) -> None:
        self._check()
        slot = self._slots.pop(frame.reply.seq)
        self.connection.host.when_computed(lambda: self._answer(frame, slot, buffer))

    def _answer(self, frame: Frame, slot: int, buffer: Tensor) -> None:
        connection, seq = self.connection, frame.reply.seq
        if not connection.open:
            return
        _answer_in(connection.slots[slot], buffer.numel()).copy_(buffer)
        calls = {} if connection.channel is None else connection.channel.calls
        used_for = next((one for one, (used, _) in calls.items() if used == slot), None)
        connection.host.world.tell(Wrote(connection.host, connection, seq, slot, used_for))
        connection.unanswered.pop(seq, None)
        connection.send(connection.router, Parcel(frame))

    def send(self, frame: Frame) -> None:
        self._check()
        self.connection.host.when_computed(lambda: self._send(frame))

    def _send(self, frame: Frame) -> None:
        if frame.HasField("refusal"):
            self.connection.unanswered.pop(frame.refusal.seq, None)
        self.connection.send(self.connection.router, Parcel(frame))

    def close(self) -> None:
        self.connection.unanswered.clear()
        self.connection.close(by=self.connection.host)


class SimLendingSession(SimSession):
    """A host's end of a connection on its own machine."""

    def lend(
        self, model: str, descriptors: Sequence[int], chunks: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._check()
        (descriptor,) = descriptors  # hosts of a world compute on CPUs
        parcel = Parcel(lend_frame(model, chunks), descriptor=Descriptor(descriptor))
        self.connection.send(self.connection.router, parcel)

    def take_back(self, model: str, chunks: Sequence[tuple[int, int]] = ()) -> None:
        self._check()
        self._send(lend_frame(model, chunks))


class SimListener:
    """What routers of a world connect to at one incarnation of a host."""

    def __init__(self, network: Network) -> None:
        self.address = ""
        self._fd = next(network.descriptors)
        self._waiting: list[Session] = []

    def fileno(self) -> int:
        return self._fd

    @property
    def readable(self) -> bool:
        return bool(self._waiting)

    def put(self, session: Session) -> None:
        self._waiting.append(session)

    def accept(self) -> list[Session]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def close(self) -> None:
        self._waiting.clear()


def named_by(call: Call, ids_TK: Tensor) -> tuple[ExpertVersion, ...]:
    """Return the experts that a call names, each in the version that it names."""
    others = {one.expert: one.version for one in call.other_versions}
    versions, key = LayerVersions(call.version, others), LayerKey(call.model, call.layer)
    experts = sorted({int(expert) for expert in ids_TK.reshape(-1).tolist() if expert >= 0})
    return tuple(ExpertVersion(key.expert(one), versions.of(one)) for one in experts)


def _answer_in(slot: Tensor, size: int) -> Tensor:
    """Return the part of a slot, at its end, in which an answer of ``size`` bytes is."""
    return slot[SLOT_BYTES - size :]
