"""The one interface of all transports: frames with tensors, never blocking.

A router holds a `Channel` to each host; a host holds a `Session` for each router, made by a
`Listener`. Each has a file descriptor that becomes readable when there is something to receive or
the other side is gone, so that one thread can wait for all of them. Nothing here decides anything:
`cluster/` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ...proto.errors import CallError, MoesaicError
from ...proto.expert_pb2 import Call, Frame
from ...proto.wire import WIRE_VERSION, CallLayout


class Inbound(NamedTuple):
    """A frame and, for calls and replies, the bytes of its tensors (uint8).

    The bytes of a reply are valid until `Channel.release`; those of a call until it is answered.
    A call that the transport has not kept, because it does not fit or there is no room for it,
    comes with the error that it is to be ``refused`` with.
    """

    frame: Frame
    payload: Tensor | None = None
    refused: MoesaicError | None = None


def call_of(frame: Frame) -> Call:
    """The call of a call frame, or the one that a backward frame wraps."""
    return frame.backward.call if frame.HasField("backward") else frame.call


def check_version(theirs: int, peer: str) -> None:
    """Raises CallError when a Hello or Welcome speaks another version of the wire."""
    if theirs != WIRE_VERSION:
        raise CallError(f"wire_version: {peer} speaks {theirs}, this side {WIRE_VERSION}")


class Channel(Protocol):
    """A router's connection to one host. Used by one thread at a time."""

    @property
    def host(self) -> str: ...

    @property
    def slot_bytes(self) -> int:
        """Largest `CallLayout.slot_bytes` of a call."""
        ...

    def fileno(self) -> int: ...

    def send_call(self, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]) -> None:
        """Send a call whose tensors ``write`` puts into the buffer that it is given.

        The call announces its ``payload_bytes``; the transport may set fields of its own. Raises
        HostLost when the connection has ended and CallError when ``layout`` exceeds `slot_bytes`.
        """
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame without tensors. Raises HostLost when the connection has ended."""
        ...

    def receive(self) -> list[Inbound]:
        """All frames that have arrived, Welcome first. Raises HostLost behind the last."""
        ...

    def release(self, seq: int) -> None:
        """The bytes of the reply to ``seq`` are no longer needed."""
        ...

    def close(self) -> None: ...


class Session(Protocol):
    """A host's connection to one router. Used by the host's loop alone."""

    router: str

    @property
    def slot_bytes(self) -> int:
        """Largest `CallLayout.slot_bytes` of a call that can be answered."""
        ...

    def fileno(self) -> int: ...

    def receive(self) -> list[Inbound]:
        """All frames that have arrived, Hello first. Raises HostLost behind the last."""
        ...

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        """At least ``layout.reply_bytes`` bytes (uint8) to compute the answer of a call into."""
        ...

    def send_reply(self, frame: Frame, buffer: Tensor) -> None:
        """Send a reply whose ``payload_bytes`` are in ``buffer``, of `reply_buffer`.

        The buffer is the transport's from now on. Raises HostLost.
        """
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame without tensors. Raises HostLost."""
        ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Where routers connect to a host."""

    @property
    def address(self) -> str: ...

    def fileno(self) -> int: ...

    def accept(self) -> list[Session]:
        """The routers that have connected since the last call; never blocks. To be called now and
        then also when nothing is readable: it ends connections that have said nothing for long."""
        ...

    def close(self) -> None: ...
