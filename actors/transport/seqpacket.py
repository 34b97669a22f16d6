"""Frames as datagrams of a Unix SOCK_SEQPACKET socket between processes of one user."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from ...proto.errors import HostLost
from ...proto.expert_pb2 import Frame
from .base import InboundFrame

_DATAGRAM_BYTES = 1 << 16
MOST_DESCRIPTORS = 64  # with one frame; Linux takes 253


class FrameSocket:
    """A SEQPACKET socket that reports every loss of the other side as HostLost."""

    def __init__(self, sock: socket.socket, *, takes_descriptors: bool = False) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._takes_descriptors = takes_descriptors
        self._descriptors: list[int] = []  # that came with the last datagram
        self._end: HostLost | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, frame: Frame, descriptors: Sequence[int] = ()) -> None:
        """Send a frame with at most `MOST_DESCRIPTORS` descriptors, which stay the caller's."""
        try:
            if descriptors:
                socket.send_fds(self._sock, [frame.SerializeToString()], descriptors)
            else:
                self._sock.send(frame.SerializeToString())
        except OSError as error:
            # A full buffer means that the other side has not read for hundreds of frames.
            raise HostLost(f"shared-memory socket: {error}") from error

    def receive(self, take: Callable[[Frame], InboundFrame | None]) -> list[InboundFrame]:
        """Apply ``take`` to all frames that have arrived. Raises HostLost after the last.

        A socket that `takes_descriptors` adds those that came with a frame of kind ``lend``.
        """
        inbounds: list[InboundFrame] = []
        try:
            if self._end is not None:
                raise self._end
            while (data := self._next()) is not None:
                inbound = take(_decode(data))
                if inbound is not None:
                    inbounds.append(self._with_descriptor(inbound))
                self._drop_descriptors()
        except HostLost as lost:
            self._drop_descriptors()
            if not inbounds:
                raise
            self._end = lost
            self.end()  # makes the descriptor readable, so that the caller comes back for the error
        return inbounds

    def receive_first(self) -> tuple[Frame | None, list[int]]:
        """Return the first frame, if it has arrived, and the descriptors that came with it."""
        try:
            data, fds, _, _ = socket.recv_fds(
                self._sock, _DATAGRAM_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None, []
        except OSError as error:
            raise HostLost(f"shared-memory socket: {error}") from error
        try:
            return _decode(data), fds
        except HostLost:
            close_all(fds)
            raise

    def end(self) -> None:
        """Shut the connection down; frames that have arrived can still be received.

        The descriptor becomes readable.
        """
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _with_descriptor(self, inbound: InboundFrame) -> InboundFrame:
        if not (self._descriptors and inbound.frame.HasField("lend")):
            return inbound
        found, self._descriptors = tuple(self._descriptors), []
        return inbound._replace(descriptors=found)

    def _drop_descriptors(self) -> None:
        """Close the descriptors of the last datagram that no frame has claimed."""
        close_all(self._descriptors)
        self._descriptors = []

    def _next(self) -> bytes | None:
        while True:
            try:
                if not self._takes_descriptors:
                    return self._sock.recv(_DATAGRAM_BYTES)
                data, self._descriptors, _, _ = socket.recv_fds(
                    self._sock, _DATAGRAM_BYTES, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
                return data
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # the other side closed with frames of ours unread; read on for its own
            except OSError as error:
                raise HostLost(f"shared-memory socket: {error}") from error


def _decode(data: bytes) -> Frame:
    if not data:
        raise HostLost("shared-memory socket: the other side has closed it")
    if len(data) == _DATAGRAM_BYTES:
        raise HostLost(
            f"shared-memory socket: the other side sent {_DATAGRAM_BYTES} bytes or more at once, "
            "which no frame has"
        )
    try:
        return Frame.FromString(data)
    except DecodeError as error:
        raise HostLost(f"shared-memory socket: the bytes are not a frame: {error}") from error


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
