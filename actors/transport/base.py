"""The interface of all transports: they carry frames with tensors, and receiving never blocks.

A router holds a `Channel` to each host; a host holds a `Session` for each router, made by a
`Listener`. Each has a file descriptor that becomes readable when there is something to receive or
the other side is gone, so that one thread can wait for all of them. Transports decide nothing: the
decisions are in `cluster/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ...proto.errors import CallError, MoesaicError
from ...proto.expert_pb2 import Call, Frame, Lend
from ...proto.wire import WIRE_VERSION, CallLayout


class InboundFrame(NamedTuple):
    """A frame and, for calls and replies, the bytes of its tensors (uint8).

    The bytes of a reply are valid until `Channel.release`; those of a call until it is answered.
    ``refused`` is set for a call whose tensors the transport discarded, because they do not fit or
    there was no room: the host answers the call with this error. Whoever gets ``descriptors``
    closes them.
    """

    frame: Frame
    payload: Tensor | None = None
    refused: MoesaicError | None = None
    descriptors: tuple[int, ...] = ()


def lend_frame(model: str, chunks: Sequence[tuple[int, int]]) -> Frame:
    """Return the frame that lends memory, with descriptors, or takes it back, without."""
    return Frame(lend=Lend(model=model, chunks=[Lend.Chunk(number=n, serial=s) for n, s in chunks]))


def call_of(frame: Frame) -> Call:
    """Return the call of a call frame, or the one that a backward frame wraps."""
    return frame.backward.call if frame.HasField("backward") else frame.call


def call_id(router: str, step: int, layer: int) -> str:
    """Return how logs name the calls of one layer in one step of a router."""
    return f"{router}/{step}/{layer}"


def check_version(theirs: int, peer: str) -> None:
    """Check the wire version of a Hello or Welcome. Raises CallError for another version."""
    if theirs != WIRE_VERSION:
        raise CallError(
            f"wire_version: {peer} has version {theirs}, but this side has {WIRE_VERSION}; install "
            "the same version of Moesaic on all machines"
        )


def check_slot(layout: CallLayout, slot_bytes: int) -> None:
    """Check that a slot has room for a call and its answer. Raises CallError if it has not."""
    if layout.slot_bytes > slot_bytes:
        raise CallError(
            f"rows: the call and its answer take {layout.slot_bytes} bytes, but a slot has "
            f"{slot_bytes}; send fewer rows in one call"
        )


class Channel(Protocol):
    """A router's connection to one host, used by one thread at a time."""

    @property
    def host(self) -> str: ...

    @property
    def slot_bytes(self) -> int:
        """Largest `CallLayout.slot_bytes` of a call."""
        ...

    def fileno(self) -> int: ...

    def send_call(self, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]) -> None:
        """Send a call; ``write`` writes its tensors into the buffer that it is given.

        The call announces its ``payload_bytes``; the transport may set fields of its own. Raises
        HostLost if the connection has ended, and CallError if ``layout`` exceeds `slot_bytes`.
        """
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame without tensors. Raises HostLost if the connection has ended."""
        ...

    def receive(self) -> list[InboundFrame]:
        """Return all frames that have arrived, Welcome first. Raises HostLost after the last."""
        ...

    def release(self, seq: int) -> None:
        """Give up the bytes of the reply to ``seq``, and any wait for it."""
        ...

    def close(self) -> None: ...


class Session(Protocol):
    """A host's connection to one router, used by the host's loop alone."""

    router: str

    @property
    def slot_bytes(self) -> int:
        """Largest `CallLayout.slot_bytes` of a call that can be answered."""
        ...

    def fileno(self) -> int: ...

    def receive(self) -> list[InboundFrame]:
        """Return all frames that have arrived, Hello first. Raises HostLost after the last."""
        ...

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        """Return a buffer (uint8) of ``layout.reply_bytes`` or more for the answer of a call."""
        ...

    def send_reply(self, frame: Frame, buffer: Tensor) -> None:
        """Send a reply whose ``payload_bytes`` are in ``buffer``, which `reply_buffer` returned.

        The transport owns the buffer from now on. Raises HostLost.
        """
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame without tensors. Raises HostLost."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class LendingSession(Session, Protocol):
    """A session whose transport can carry descriptors."""

    def lend(
        self, model: str, descriptors: Sequence[int], chunks: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Lend a model's memory, by a descriptor that stays the caller's. Raises HostLost.

        With ``chunks``, (number, serial) of a device's memory, it is a descriptor for each of them.
        """
        ...

    def take_back(self, model: str, chunks: Sequence[tuple[int, int]] = ()) -> None:
        """Let the router compute with a model's memory, or chunks of it, no longer.

        Raises HostLost.
        """
        ...


class Listener(Protocol):
    """The endpoint of a host that routers connect to."""

    @property
    def address(self) -> str: ...

    def fileno(self) -> int: ...

    def accept(self) -> list[Session]:
        """Return the routers that have connected since the last call; never block.

        Call it now and then even when nothing is readable: it ends connections that have sent
        nothing for too long.
        """
        ...

    def close(self) -> None: ...
