"""A process group of two, one router and one host: it carries the bytes of tensors, nothing else.

What is carried is announced in order by the frames of a gRPC stream (`grpc_stream.py`), and both
sides send and receive in that order. torch's default process group is not touched: a pair has a
TCPStore of its own, which is new for every connection, so bytes of an older one cannot get here.

Every operation has a deadline, and behind one that misses it the pair is of no use any more. Gloo
has no way to end operations that wait, `abort` and `shutdown` included (torch 2.13); but one that
times out closes all connections of its group, and so ends the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from ...proto.errors import CallError, HostLost

# A peer that does not take or give a piece for so long is lost.
OP_TIMEOUT_S = 5.0
# From the announcement of the store until both sides are connected.
MEET_TIMEOUT_S = 2.0
# What one operation carries at most, so that its deadline does not depend on the tensor's size.
PIECE_BYTES = 8 << 20
HOST_RANK, ROUTER_RANK = 0, 1
# Its classes are not in its stubs.
_dist: Any = distributed
# Of the operation that only ends the others.
_ABORT_TAG = 1
# torch's own errors are RuntimeErrors.
_FAILURES = (RuntimeError, OSError, ValueError)
_NCCL_POLL_S = 20e-6
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_CLEAN_UP_ONLY = "2"
_environment = threading.Lock()


def backends() -> tuple[str, ...]:
    """The backends that this build of torch has."""
    if not distributed.is_available():
        return ()
    had = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    return tuple(name for name, there in had.items() if there)


class _Group(Protocol):
    """A connected group. ``send`` and ``receive`` are used by one thread each, ``abort`` by any."""

    def send(self, piece: Tensor) -> None: ...

    def receive(self, piece: Tensor) -> None: ...

    def linger(self, timeout_s: float) -> None: ...

    def abort(self) -> None: ...


class Pair:
    """One side of a pair: `open` (host) and `join`, then `send` and `receive` until `abort`."""

    def __init__(self, peer: str, backend: str, device: torch.device) -> None:
        """Raises CallError when ``backend`` cannot be had here on ``device``."""
        if backend not in backends():
            raise CallError(f"group: no backend {backend!r} here, only {', '.join(backends())}")
        if backend == "nccl" and device.type != "cuda":
            raise CallError(f"group: nccl needs a CUDA device on both sides, this one has {device}")
        self.peer = peer
        self.device = device if backend == "nccl" else torch.device("cpu")
        self._backend = backend
        self._store: Any = None
        self._group: _Group | None = None
        self._lock = threading.Lock()
        self._met = threading.Event()  # or aborted
        self._aborted = False

    @property
    def joined(self) -> bool:
        return self._group is not None

    def open(self, bind: str) -> str:
        """Listen on ``bind``, an IP, for the other side; gives the address to `join`."""
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as listening:
                listening.bind((bind, 0))
                listening.listen()
                port = listening.getsockname()[1]
                # The store owns a descriptor that it is given, and without listens everywhere.
                self._store = _store(bind, port, listen_fd=os.dup(listening.fileno()))
        except _FAILURES as error:
            raise self._lost(error) from error
        return f"{bind}:{port}"

    def join(self, rank: int, address: str) -> None:
        """Wait for the other side and connect. Raises HostLost after `MEET_TIMEOUT_S`."""
        try:
            group = self._connect(rank, address)
        except _FAILURES as error:
            raise self._lost(error) from error
        self._store = None
        with self._lock:
            if not self._aborted:
                self._group = group
                self._met.set()
                return
        group.abort()
        del group
        raise HostLost(f"{self.peer}: the group was aborted")

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def send(self, piece: Tensor) -> None:
        """Wait until the other side takes ``piece``. Raises HostLost, and aborts the pair."""
        try:
            self._connected().send(piece)
        except _FAILURES as error:
            raise self._lost(error) from error

    def receive(self, size: int) -> Tensor:
        """The next ``size`` bytes. Raises HostLost, and aborts the pair."""
        whole = self.buffer(size)
        try:
            for piece in pieces(whole):
                self._connected().receive(piece)
        except _FAILURES as error:
            raise self._lost(error) from error
        return whole

    def linger(self, timeout_s: float) -> None:
        """Wait until the other side has ended the pair, so that it has what was sent last: a send
        is over when the bytes are on their way. `abort` follows."""
        group = self._group
        if group is not None:
            group.linger(timeout_s)

    def abort(self) -> None:
        """End what waits, here and, if it is alive, on the other side. From any thread."""
        with self._lock:
            self._aborted = True
            self._met.set()
            group, self._group, self._store = self._group, None, None
        if group is not None:
            group.abort()

    def _connect(self, rank: int, address: str) -> _Group:
        host, _, port = address.rpartition(":")
        store = self._store or _store(host, int(port))
        if self._backend == "nccl":
            return _Nccl(store, rank, self.device)
        return _Gloo(store, rank, host if rank == HOST_RANK else _address_towards(host))

    def _connected(self) -> _Group:
        """Of a router's calls, the first may be sent while the two still meet."""
        self._met.wait(MEET_TIMEOUT_S)
        group = self._group
        if group is None:
            raise HostLost(f"{self.peer}: there is no group")
        return group

    def _lost(self, error: Exception) -> HostLost:
        self.abort()
        # Whoever keeps the error is not to keep what the group's frames hold with it.
        error.__traceback__ = None
        # In one line, without the frames of C++ that torch appends.
        reason = str(error).partition("\n")[0]
        return HostLost(f"{self.peer}: {self._backend}: {reason}")


def pieces(payload: Tensor) -> Iterator[Tensor]:
    """Of ``payload`` (uint8), in the order in which they travel; none of an empty one."""
    for start in range(0, payload.numel(), PIECE_BYTES):
        yield payload[start : start + PIECE_BYTES]


def _store(host: str, port: int, listen_fd: int | None = None) -> Any:
    return _dist.TCPStore(
        host,
        port,
        world_size=2,
        is_master=listen_fd is not None,
        timeout=timedelta(seconds=MEET_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _address_towards(host: str) -> str:
    """The IP of this machine that ``host`` sees; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(address)
        return sock.getsockname()[0]


class _Gloo:
    def __init__(self, store: Any, rank: int, bind: str) -> None:
        options = _dist.ProcessGroupGloo._Options()
        # A device of its own: its thread and its sockets end with the group.
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=bind, lazy_init=False)]
        options._threads = 1  # for collectives, which there are none of
        options._timeout = timedelta(seconds=MEET_TIMEOUT_S)
        self._group = _dist.ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank

    def send(self, piece: Tensor) -> None:
        self._group.send([piece], self._peer, 0).wait(timedelta(seconds=OP_TIMEOUT_S))

    def receive(self, piece: Tensor) -> None:
        self._group.recv([piece], self._peer, 0).wait(timedelta(seconds=OP_TIMEOUT_S))

    def linger(self, timeout_s: float) -> None:
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # it times out, or the other side has closed
            waiting = self._group.recv([nothing], self._peer, _ABORT_TAG)
            waiting.wait(timedelta(seconds=timeout_s))

    def abort(self) -> None:
        self.linger(0.001)


class _Nccl:
    """Written for CUDA and not run by the tests of a machine without: see docs/design.md."""

    def __init__(self, store: Any, rank: int, device: torch.device) -> None:
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
        self._device = device
        self._peer = 1 - rank
        # A communicator for each direction: the operations of one run one after the other, so two
        # sides that send before they receive would wait for ever.
        with _without_teardown():
            groups = [self._make(_dist.PrefixStore(n, store), rank) for n in ("answers", "calls")]
        self._out, self._in = groups if rank == HOST_RANK else reversed(groups)
        # The first operation connects, which takes as long as it takes; not in the midst of calls.
        first = torch.zeros(1, dtype=torch.uint8, device=device)
        for receives in (rank == HOST_RANK, rank != HOST_RANK):
            (self.receive if receives else self.send)(first)

    def _make(self, store: Any, rank: int) -> Any:
        nccl = _dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=2 * OP_TIMEOUT_S)  # ours comes first
        return nccl(store, rank, 2, options)

    def send(self, piece: Tensor) -> None:
        # What is in the buffer was written on the stream of another thread.
        torch.cuda.synchronize(self._device)
        self._finish(self._out.send([piece], self._peer, 0))

    def receive(self, piece: Tensor) -> None:
        self._finish(self._in.recv([piece], self._peer, 0))

    def _finish(self, work: Any) -> None:
        """`Work.wait` would only order streams; what is announced as received must be there."""
        until = time.monotonic() + OP_TIMEOUT_S
        while not work.is_completed():
            if time.monotonic() > until:
                raise RuntimeError(f"timed out after {OP_TIMEOUT_S:g} s")
            time.sleep(_NCCL_POLL_S)
        work.wait()

    def linger(self, timeout_s: float) -> None:
        """Nothing: NCCL does not say when the other side has closed."""

    def abort(self) -> None:
        for group in (self._out, self._in):
            group.abort()


@contextlib.contextmanager
def _without_teardown() -> Iterator[None]:
    """By default torch ends the whole process when a peer of an NCCL group is lost; groups read
    this as they are made. What the user has set stays."""
    with _environment:
        if _ERROR_HANDLING in os.environ:
            yield
            return
        os.environ[_ERROR_HANDLING] = _CLEAN_UP_ONLY
        try:
            yield
        finally:
            del os.environ[_ERROR_HANDLING]
