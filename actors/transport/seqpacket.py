"""Frames as datagrams of a Unix SOCK_SEQPACKET socket between processes of one user."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable

from google.protobuf.message import DecodeError

from ...proto.errors import HostLost
from ...proto.expert_pb2 import Frame
from .base import InboundFrame

_DATAGRAM_BYTES = 1 << 16


class FrameSocket:
    """A SEQPACKET socket that reports every loss of the other side as HostLost."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._end: HostLost | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, frame: Frame) -> None:
        try:
            self._sock.send(frame.SerializeToString())
        except OSError as error:
            # A full buffer means that the other side has not read for hundreds of frames.
            raise HostLost(f"shared-memory socket: {error}") from error

    def receive(self, take: Callable[[Frame], InboundFrame | None]) -> list[InboundFrame]:
        """Apply ``take`` to all frames that have arrived. Raises HostLost after the last."""
        inbounds: list[InboundFrame] = []
        try:
            if self._end is not None:
                raise self._end
            while (data := self._next()) is not None:
                inbound = take(_decode(data))
                if inbound is not None:
                    inbounds.append(inbound)
        except HostLost as lost:
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

    def _next(self) -> bytes | None:
        while True:
            try:
                return self._sock.recv(_DATAGRAM_BYTES)
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


def same_user(sock: socket.socket) -> bool:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid == os.getuid()


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
