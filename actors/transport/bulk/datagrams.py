"""Messages of the bulk path: datagrams of a Unix SOCK_SEQPACKET socket between two processes.

A file that goes through shared memory is announced in few pieces (`send_file`, `receive_file`), so
that the reader copies or checks one while the writer writes the next. They are so few that they
always fit into the socket's queue: a writer never waits for a reader.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from ....proto.errors import CallError, Corrupted, Expired, HostLost
from ....proto.expert_pb2 import Bulk
from ..seqpacket import close_all
from ..tensor_bytes import TensorBytes

DATAGRAM_BYTES = 1 << 16  # the longest message
# Linux queues 10 datagrams, if nothing else is set.
_MOST_PIECES = 6
_PIECE_BYTES = 4 << 20


class Received(NamedTuple):
    message: Bulk
    descriptors: list[int]  # whoever gets them closes them


class BulkSocket:
    """A connected socket; every loss of the other side is HostLost."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        """Take the socket over. ``peer`` is how errors name the other side."""
        sock.setblocking(False)
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.peer = peer

    def send(self, message: Bulk, descriptors: Sequence[int] = ()) -> None:
        """Send a message; ``descriptors`` stay the caller's."""
        try:
            socket.send_fds(self._sock, [message.SerializeToString()], descriptors)
        except OSError as error:
            # A full queue means that the other side has not read for many messages.
            raise HostLost(f"{self.peer}: the bulk connection has ended: {error}") from error

    def receive(self, until: float) -> Received:
        """Wait for the next message. Raises Expired at ``until`` (of time.monotonic)."""
        while True:
            left_s = max(0.0, until - time.monotonic())
            if not self._poll.poll(left_s * 1e3):
                raise Expired(f"{self.peer}: it did not answer in time")
            try:
                data, fds, flags, _ = socket.recv_fds(
                    self._sock, DATAGRAM_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except ConnectionResetError:
                continue  # it closed with messages of ours unread; read on for its own
            except OSError as error:
                raise HostLost(f"{self.peer}: the bulk connection has ended: {error}") from error
            try:
                if not data:
                    raise HostLost(f"{self.peer}: it has closed the bulk connection")
                if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise HostLost(f"{self.peer}: a message or its descriptor did not arrive whole")
                return Received(Bulk.FromString(data), fds)
            except DecodeError as error:
                close_all(fds)
                raise HostLost(f"{self.peer}: the bytes are not a message: {error}") from error
            except BaseException:
                close_all(fds)
                raise

    def has_ended(self) -> bool:
        """Return whether the connection has ended, or an unrequested message has arrived."""
        return bool(self._poll.poll(0))

    def end(self) -> None:
        """Shut the connection down: whoever waits for a message gets HostLost."""
        with contextlib.suppress(OSError):  # it has ended before
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def send_file(sock: BulkSocket, seq: int, file: TensorBytes, memory: np.ndarray) -> None:
    """Write ``file`` into shared ``memory`` (uint8), and say how far it is."""
    digest = xxhash.xxh3_64(seed=seq)
    piece = max(_PIECE_BYTES, -(-file.nbytes // _MOST_PIECES))
    told = 0
    for written in file.write(memory, digest):
        if written == file.nbytes:
            sock.send(_written(seq, written, file.nbytes, digest.intdigest()))
        elif written - told >= piece:
            sock.send(_written(seq, written, file.nbytes))
            told = written


def _written(seq: int, written: int, total: int, checksum: int = 0) -> Bulk:
    message = Bulk.Written(seq=seq, bytes=written, total_bytes=total, checksum=checksum)
    return Bulk(written=message)


def receive_file(
    first: Bulk.Written,
    total: int,
    receive: Callable[[], Bulk.Written],
    read: Callable[[int, int, xxhash.xxh3_64], None],
) -> None:
    """Follow a file from its ``first`` piece; ``read`` reads and digests each range of bytes.

    Raises CallError if the pieces are not those of a file of ``total`` bytes, and Corrupted if the
    checksum is not that of what was read.
    """
    digest = xxhash.xxh3_64(seed=first.seq)
    begin, piece = 0, first
    while True:
        end = piece.bytes
        if piece.seq != first.seq or piece.total_bytes != total or not begin < end <= total:
            raise CallError(
                f"bytes: {end} of {piece.total_bytes} bytes of transfer {piece.seq} are said to be "
                f"written, after {begin} of {total} of transfer {first.seq}"
            )
        read(begin, end, digest)
        if end == total:
            break
        begin, piece = end, receive()
    if digest.intdigest() != piece.checksum:
        raise Corrupted(
            f"checksum: the tensors have {digest.intdigest():#x}, but {piece.checksum:#x} was "
            "announced"
        )
