"""Shared memory between processes of one machine: main memory, or a GPU's (`cuda_memory.py`).

The router makes an anonymous memfd of equal slots and passes it over a Unix SOCK_SEQPACKET socket
with an abstract address. The socket also carries the frames, and its end tells that the other side
died. Nothing has a name in any file system, so nothing is left when either side is killed. A slot
holds one call, followed by its answer. It is free again only when its call was answered or the
connection ended, so a host that froze and woke up late cannot overwrite another call's answer.

Abstract addresses are listed in /proc, and every process in the same network namespace can connect
to them. So a host accepts only processes of its own user, and maps and opens nothing before the
Hello has shown the cluster's proof. It ends connections that send no Hello.
"""

from __future__ import annotations

import errno
import fcntl
import hmac
import logging
import mmap
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...proto.errors import CallError, HostLost, InternalError
from ...proto.expert_pb2 import Frame, Hello
from ...proto.keys import ClusterSecret, secret_of_process
from ...proto.limits import HELLO_S, MAX_UNANNOUNCED
from ...proto.unix_peers import same_user
from ...proto.wire import ALIGNMENT_BYTES, WIRE_VERSION, CallLayout
from .base import InboundFrame, Session, call_of, check_slot, check_version, lend_frame
from .cuda_memory import CudaMemory, open_shared, share
from .seqpacket import FrameSocket, close_all

log = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Errors of accept(2) that pass: no descriptor or memory is free, or the other side has left.
_TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)
MAX_SLOTS = 1024
MAX_SLOT_BYTES = 1 << 30


class _Memory:
    """A mapping of a memfd, as uint8 tensors, one for each slot."""

    def __init__(self, fd: int, slots: int, slot_bytes: int) -> None:
        self._map = mmap.mmap(fd, slots * slot_bytes)
        # numpy arrays keep the mapping from being closed while they exist. A tensor made by
        # torch.frombuffer does not, and reading it after the close kills the process.
        whole = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))
        self.slots = list(whole.view(slots, slot_bytes).unbind())

    def written(self) -> None:
        """Do nothing, as every process sees writes to main memory at once."""

    def close(self) -> None:
        self.slots.clear()
        try:
            self._map.close()
        except BufferError:
            # An answer is still in use; the mapping ends with its last view.
            return


def _reply_start(slot_bytes: int, reply_bytes: int) -> int:
    """Return the aligned offset of an answer, which is placed at the end of its slot."""
    return (slot_bytes - reply_bytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


class ShmChannel:
    """A router's side of one connection."""

    def __init__(
        self,
        host: str,
        address: str,
        *,
        router: str,
        slots: int,
        slot_bytes: int,
        device: torch.device | None = None,
        proof: bytes | None = None,
        borrows: bool = False,
    ) -> None:
        """Connect without waiting; the host's Welcome arrives as the first frame.

        ``proof`` is what the host asks for (None: the proof for a listener of this process). The
        slots are in the memory of ``device``, a GPU (None: in main memory). With ``borrows`` the
        host may lend the memory of its experts. Raises HostLost if no host listens at ``address``.
        """
        self._host = host
        self._slot_bytes = -(-slot_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        # seq -> (slot, size of the answer if it is known), until the call is released
        self._calls: dict[int, tuple[int, int | None]] = {}
        self._free = list(range(slots))
        hello = Frame()
        hello.hello.wire_version = WIRE_VERSION
        hello.hello.router = router
        hello.hello.slots = slots
        hello.hello.slot_bytes = self._slot_bytes
        hello.hello.proof = proof or secret_of_process().proof("shm", "")
        hello.hello.borrows = borrows
        memory: _Memory | CudaMemory | None = None
        fds: list[int] = []
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect("\0" + address)
            if not same_user(sock):
                raise HostLost(f"{address}: the listening process belongs to another user")
            if device is not None:
                memory, described = share(device, slots, self._slot_bytes)
                hello.hello.device_memory.CopyFrom(described)
            else:
                fds.append(os.memfd_create("moesaic", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
                os.ftruncate(fds[0], slots * self._slot_bytes)
                fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, _SEALS)
                memory = _Memory(fds[0], slots, self._slot_bytes)
            socket.send_fds(sock, [hello.SerializeToString()], fds)
        except (OSError, HostLost) as error:
            sock.close()
            if memory is not None:
                memory.close()
            if isinstance(error, HostLost):
                raise
            raise HostLost(f"{host}: cannot connect over shared memory: {error}") from error
        finally:
            close_all(fds)
        self._memory = memory
        self._sock = FrameSocket(sock, takes_descriptors=borrows)

    @property
    def host(self) -> str:
        return self._host

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    def fileno(self) -> int:
        return self._sock.fileno()

    def send_call(self, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]) -> None:
        call = call_of(frame)
        check_slot(layout, self._slot_bytes)
        if not self._free:
            raise InternalError(f"{self._host}: there are more calls in flight than slots")
        # Reuse the most recently used slot: its pages are mapped and in the cache.
        slot = self._free[-1]
        write(self._memory.slots[slot])
        self._memory.written()
        self._free.pop()
        self._calls[call.seq] = (slot, layout.reply_bytes if frame.HasField("call") else None)
        call.slot = slot
        self._sock.send(frame)

    def send(self, frame: Frame) -> None:
        self._sock.send(frame)

    def receive(self) -> list[InboundFrame]:
        return self._sock.receive(self._take)

    def release(self, seq: int) -> None:
        slot, _ = self._calls.pop(seq, (None, None))
        if slot is not None:
            self._free.append(slot)

    def close(self) -> None:
        self._sock.close()
        self._memory.close()

    def _take(self, frame: Frame) -> InboundFrame | None:
        match frame.WhichOneof("kind"):
            case "reply":
                return self._take_reply(frame)
            case "refusal":
                self.release(frame.refusal.seq)
            case "welcome":
                _check(frame.welcome.wire_version, self._host)
        return InboundFrame(frame)

    def _take_reply(self, frame: Frame) -> InboundFrame | None:
        seq, size = frame.reply.seq, frame.reply.payload_bytes
        slot, wanted = self._calls.get(seq, (None, None))
        if slot is None:
            return None  # the call was answered before, or given up
        if size > self._slot_bytes or wanted not in (None, size):
            most = f"at most {self._slot_bytes}" if wanted is None else wanted
            raise HostLost(
                f"{self._host}: the reply to call {seq} has {size} bytes, but {most} were expected"
            )
        start = _reply_start(self._slot_bytes, size)
        return InboundFrame(frame, self._memory.slots[slot][start : start + size])


class ShmSession:
    """A host's side of one connection."""

    def __init__(self, sock: socket.socket, proof: bytes, *, device_memory: bool = False) -> None:
        """Take over an accepted socket whose Hello must show ``proof``.

        ``device_memory`` says whether the Hello may bring slots on a GPU.
        """
        self._device_memory = device_memory
        self.router = ""
        self._proof = proof
        self._sock = FrameSocket(sock)
        self._memory: _Memory | CudaMemory | None = None
        self._slot_bytes = 0

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    @property
    def greeted(self) -> bool:
        """Whether a valid Hello has arrived."""
        return self._memory is not None

    def fileno(self) -> int:
        return self._sock.fileno()

    def end(self) -> None:
        """Shut the connection down; the next `receive` raises HostLost."""
        self._sock.end()

    def receive(self) -> list[InboundFrame]:
        return self._greet() if self._memory is None else self._sock.receive(self._take)

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        """Return the end of the call's own slot, which follows the call's tensors."""
        assert self._memory is not None
        start = _reply_start(self._slot_bytes, layout.reply_bytes)
        slot = self._memory.slots[call_of(frame).slot]
        return slot[start : start + layout.reply_bytes]

    def send_reply(self, frame: Frame, buffer: Tensor) -> None:
        if self._memory is not None:
            self._memory.written()
        self._sock.send(frame)

    def send(self, frame: Frame) -> None:
        self._sock.send(frame)

    def lend(
        self, model: str, descriptors: Sequence[int], chunks: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._sock.send(lend_frame(model, chunks), descriptors)

    def take_back(self, model: str, chunks: Sequence[tuple[int, int]] = ()) -> None:
        self._sock.send(lend_frame(model, chunks))

    def close(self) -> None:
        self._sock.close()
        if self._memory is not None:
            self._memory.close()

    def _take(self, frame: Frame) -> InboundFrame:
        if not (frame.HasField("call") or frame.HasField("backward")):
            return InboundFrame(frame)
        assert self._memory is not None
        call, slots = call_of(frame), self._memory.slots
        if call.slot >= len(slots) or call.payload_bytes > self._slot_bytes:
            raise HostLost(
                f"{self.router}: a call names slot {call.slot} and {call.payload_bytes} bytes, but "
                f"there are {len(slots)} slots of {self._slot_bytes} bytes"
            )
        return InboundFrame(frame, slots[call.slot][: call.payload_bytes])

    def _greet(self) -> list[InboundFrame]:
        """Receive the Hello: it brings the router's memory, or says how to open it."""
        frame, fds = self._sock.receive_first()
        if frame is None:
            return []
        hello = frame.hello
        try:
            # The proof comes first: nothing else that a stranger sends is looked at.
            if not hmac.compare_digest(hello.proof, self._proof):
                raise HostLost("the Hello lacks this cluster's proof for this host")
            _check(hello.wire_version, repr(hello.router))
            on_gpu = hello.HasField("device_memory")
            if on_gpu and not self._device_memory:
                raise HostLost(
                    f"{hello.router!r}: it has slots in device memory, which network.transport of "
                    "the cluster's spec does not allow"
                )
            if not _sane(hello) or not (on_gpu or (fds and _sealed(fds[0], hello))):
                raise HostLost(f"{hello.router!r}: its Hello lacks a sealed memfd with its slots")
            if on_gpu:
                self._memory = open_shared(hello)
            else:
                self._memory = _Memory(fds[0], hello.slots, hello.slot_bytes)
        except OSError as error:
            raise HostLost(f"{hello.router!r}: its memory cannot be mapped: {error}") from error
        finally:
            close_all(fds)
        self._slot_bytes = hello.slot_bytes
        self.router = hello.router
        return [InboundFrame(frame)]


def _check(version: int, peer: str) -> None:
    try:
        check_version(version, peer)
    except CallError as error:
        raise HostLost(str(error)) from error


def _sane(hello: Hello) -> bool:
    aligned = hello.slot_bytes % ALIGNMENT_BYTES == 0
    return 1 <= hello.slots <= MAX_SLOTS and 1 <= hello.slot_bytes <= MAX_SLOT_BYTES and aligned


def _sealed(fd: int, hello: Hello) -> bool:
    """Check that the memfd has its size and cannot shrink, which would give this host a SIGBUS."""
    if os.fstat(fd).st_size != hello.slots * hello.slot_bytes:
        return False
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK != 0
    except OSError as error:
        if error.errno == errno.EINVAL:  # not a memfd
            return False
        raise


class ShmListener:
    """An abstract Unix socket with a random name, so that there is no file to unlink.

    A connection must send its Hello within `HELLO_S`, and at most `MAX_UNANNOUNCED` connections may
    be without one. If there are more, the oldest is ended: an honest router sends its Hello as soon
    as it has connected.
    """

    def __init__(
        self,
        *,
        secret: ClusterSecret | None = None,
        target: str = "",
        device_memory: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen for members of the cluster that has ``secret`` (None: that of this process).

        Their proof must be for ``target`` (`keys.target`). ``device_memory`` says whether the spec
        asks for slots on a GPU; if not, the host opens none. ``clock`` counts seconds.
        """
        self._device_memory = device_memory
        self._proof = (secret or secret_of_process()).proof("shm", target)
        self._clock = clock
        # (deadline of the Hello, session) of connections without a Hello, the oldest first.
        self._silent: deque[tuple[float, ShmSession]] = deque()
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
        while len(sessions) < MAX_UNANNOUNCED:  # a flood must not keep the loop from its routers
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
                # This process may be out of descriptors: end all connections without a Hello to
                # free some, and go on.
                log.warning("shared memory: cannot accept a connection: %s", error)
                self._send_away(keep=0)
                return sessions
            if same_user(sock):
                session = ShmSession(sock, self._proof, device_memory=self._device_memory)
                self._silent.append((self._clock() + HELLO_S, session))
                sessions.append(session)
            else:
                sock.close()
        self._send_away()
        return sessions

    def _send_away(self, keep: int = MAX_UNANNOUNCED) -> None:
        """End connections whose Hello is overdue, and the oldest beyond ``keep`` without one."""
        now = self._clock()
        waiting = [(due, one) for due, one in self._silent if not one.greeted and one.fileno() >= 0]
        self._silent = deque(waiting)
        while self._silent and (self._silent[0][0] <= now or len(self._silent) > keep):
            self._silent.popleft()[1].end()

    def close(self) -> None:
        self._sock.close()
