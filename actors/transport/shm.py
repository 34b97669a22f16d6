"""Shared memory between processes of one machine.

The router makes an anonymous memfd of equal slots and passes it over a Unix SOCK_SEQPACKET socket
in an abstract address; the socket is also the doorbell and, by its end, the death notice. Nothing
has a name in any file system, so nothing is left when either side is killed. A slot holds one call
and, behind it, the answer; it is free again only when its call was answered or the connection
ended, so a host that froze and woke late cannot write into somebody else's answer.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from ...proto.errors import CallError, HostLost
from ...proto.expert_pb2 import Frame
from ...proto.wire import WIRE_VERSION, CallLayout
from .base import Inbound, Session

_DATAGRAM_BYTES = 1 << 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MAX_SLOTS = 1024
MAX_SLOT_BYTES = 1 << 30


class _Socket:
    """A SEQPACKET socket that maps every way in which the other side can be gone to HostLost."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, frame: Frame) -> None:
        try:
            self._sock.send(frame.SerializeToString())
        except OSError as error:
            # A full buffer means that the other side has not read for hundreds of frames.
            raise HostLost(f"shared-memory socket: {error}") from error

    def receive(self) -> list[Frame]:
        frames: list[Frame] = []
        while True:
            try:
                data = self._sock.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return frames
            except OSError as error:
                raise HostLost(f"shared-memory socket: {error}") from error
            if not data:
                if frames:
                    return frames  # the end is seen again at the next receive
                raise HostLost("shared-memory socket: closed by the other side")
            frames.append(_decode(data))

    def close(self) -> None:
        self._sock.close()


def _decode(data: bytes) -> Frame:
    try:
        return Frame.FromString(data)
    except DecodeError as error:
        raise HostLost(f"shared-memory socket: not a frame: {error}") from error


def _same_user(sock: socket.socket) -> bool:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid == os.getuid()


class _Memory:
    """A mapping of a memfd, as one uint8 tensor."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self.tensor: Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)

    def slot(self, number: int, slot_bytes: int) -> Tensor:
        assert self.tensor is not None, "used after close"
        return self.tensor[number * slot_bytes : (number + 1) * slot_bytes]

    def close(self) -> None:
        self.tensor = None
        try:
            self._map.close()
        except BufferError:
            # Somebody still reads an answer; the mapping goes with the last view of it.
            return


class ShmChannel:
    """A router's side of one connection."""

    def __init__(self, host: str, address: str, *, router: str, slots: int, slot_bytes: int) -> None:
        """Connect without waiting; the host's Welcome arrives as the first frame.

        Raises HostLost when nobody listens at ``address``.
        """
        self._host = host
        self._slot_bytes = slot_bytes
        self._slot_of: dict[int, int] = {}  # seq -> slot, until answered and released
        self._free = list(range(slots))
        fd = os.memfd_create("moesaic", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            os.ftruncate(fd, slots * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            sock.setblocking(False)
            sock.connect("\0" + address)
            if not _same_user(sock):
                raise HostLost(f"{address}: held by another user")
            hello = Frame()
            hello.hello.wire_version = WIRE_VERSION
            hello.hello.router = router
            hello.hello.slots = slots
            hello.hello.slot_bytes = slot_bytes
            socket.send_fds(sock, [hello.SerializeToString()], [fd])
            self._memory = _Memory(fd, slots * slot_bytes)
        except OSError as error:
            sock.close()
            raise HostLost(f"{host}: cannot connect over shared memory: {error}") from error
        except HostLost:
            sock.close()
            raise
        finally:
            os.close(fd)
        self._sock = _Socket(sock)

    @property
    def host(self) -> str:
        return self._host

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    def fileno(self) -> int:
        return self._sock.fileno()

    def send_call(self, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]) -> None:
        # The most recently used slot first: its pages are mapped and warm.
        slot = self._free.pop()
        self._slot_of[frame.call.seq] = slot
        write(self._memory.slot(slot, self._slot_bytes))
        frame.call.slot = slot
        self._sock.send(frame)

    def send(self, frame: Frame) -> None:
        self._sock.send(frame)

    def receive(self) -> list[Inbound]:
        inbound = []
        for frame in self._sock.receive():
            kind = frame.WhichOneof("kind")
            payload = None
            if kind == "reply":
                slot = self._slot_of.get(frame.reply.seq)
                if slot is None:
                    continue  # answered twice: the first answer counts
                whole = self._memory.slot(slot, self._slot_bytes)
                start = self._slot_bytes - frame.reply.payload_bytes
                if not 0 <= start < self._slot_bytes:
                    raise HostLost(f"{self._host}: a reply larger than its slot")
                payload = whole[start:]
            elif kind == "refusal":
                self.release(frame.refusal.seq)
            inbound.append(Inbound(frame, payload))
        return inbound

    def release(self, seq: int) -> None:
        slot = self._slot_of.pop(seq, None)
        if slot is not None:
            self._free.append(slot)

    def close(self) -> None:
        self._sock.close()
        self._memory.close()


class ShmSession:
    """A host's side of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.router = ""
        self._sock = _Socket(sock)
        self._raw = sock
        self._memory: _Memory | None = None
        self._slots = 0
        self._slot_bytes = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> list[Inbound]:
        if self._memory is None:
            return self._greet()
        inbound = []
        for frame in self._sock.receive():
            if frame.WhichOneof("kind") not in ("call", "backward"):
                inbound.append(Inbound(frame))
                continue
            call = frame.call if frame.HasField("call") else frame.backward.call
            fits = call.payload_bytes <= self._slot_bytes
            if call.slot >= self._slots or not fits:
                raise HostLost(
                    f"{self.router}: slot {call.slot} with {call.payload_bytes} bytes, but there "
                    f"are {self._slots} slots of {self._slot_bytes}"
                )
            slot = self._memory.slot(call.slot, self._slot_bytes)
            inbound.append(Inbound(frame, slot[: call.payload_bytes]))
        return inbound

    def _greet(self) -> list[Inbound]:
        """The first datagram: Hello, with the router's memory."""
        try:
            data, fds, _, _ = socket.recv_fds(self._raw, _DATAGRAM_BYTES, 1)
        except BlockingIOError:
            return []
        except OSError as error:
            raise HostLost(f"shared-memory socket: {error}") from error
        try:
            if not data:
                raise HostLost("shared-memory socket: closed before Hello")
            frame = _decode(data)
            hello = frame.hello
            size = hello.slots * hello.slot_bytes
            sane = 1 <= hello.slots <= MAX_SLOTS and 1 <= hello.slot_bytes <= MAX_SLOT_BYTES
            # A memfd that could shrink would turn a router's mistake into this host's SIGBUS.
            if not fds or not sane or os.fstat(fds[0]).st_size != size or not _sealed(fds[0]):
                raise HostLost(f"{hello.router!r}: Hello without a sealed memfd of its slots")
            self._memory = _Memory(fds[0], size)
            self._slots, self._slot_bytes = hello.slots, hello.slot_bytes
            self.router = hello.router
            return [Inbound(frame)]
        finally:
            for fd in fds:
                os.close(fd)

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        """The end of the call's own slot, behind its tensors."""
        assert self._memory is not None
        if layout.slot_bytes > self._slot_bytes:
            raise CallError(
                f"rows: call and answer take {layout.slot_bytes} bytes, a slot has "
                f"{self._slot_bytes}; send fewer rows in one call"
            )
        slot = self._memory.slot(frame.call.slot, self._slot_bytes)
        return slot[self._slot_bytes - layout.reply_bytes :]

    def send_reply(self, frame: Frame, buffer: Tensor) -> None:
        self._sock.send(frame)

    def send(self, frame: Frame) -> None:
        self._sock.send(frame)

    def close(self) -> None:
        self._sock.close()
        if self._memory is not None:
            self._memory.close()


def _sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK != 0
    except OSError as error:
        if error.errno == errno.EINVAL:  # not a memfd
            return False
        raise


class ShmListener:
    """An abstract Unix socket with a random name: nothing to unlink, nothing to guess."""

    def __init__(self) -> None:
        self._address = f"moesaic-{secrets.token_hex(16)}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.setblocking(False)
        self._sock.bind("\0" + self._address)
        self._sock.listen(128)

    @property
    def address(self) -> str:
        return self._address

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> list[Session]:
        sessions: list[Session] = []
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return sessions
            if _same_user(sock):
                sessions.append(ShmSession(sock))
            else:
                sock.close()

    def close(self) -> None:
        self._sock.close()
