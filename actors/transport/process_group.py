"""A process group of one router and one host, which carries only the bytes of tensors.

The frames of a gRPC stream (`grpc/stream.py`) announce what the group carries, and both sides send
and receive in that order. torch's default process group is not touched. Each pair has a TCPStore of
its own, made anew for every connection, so bytes of an older connection cannot arrive here.

Every operation has a deadline; a pair is unusable once an operation has missed it. Gloo cannot end
waiting operations, not even with `abort` and `shutdown` (torch 2.13). But an operation that times
out closes all connections of its group, which ends the others too.
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

# A peer that has not sent or received one piece within this time is lost.
OP_TIMEOUT_S = 5.0
# Time limit from the announcement of the store until both sides are connected.
MEET_TIMEOUT_S = 2.0
# Upper bound for one operation, so that its deadline does not depend on the tensor's size.
PIECE_BYTES = 8 << 20
HOST_RANK, ROUTER_RANK = 0, 1
# torch's stubs lack the classes that are used here.
_dist: Any = distributed
# Tag of the receive operation that serves only to end the others by timing out.
_ABORT_TAG = 1
# torch's own errors are RuntimeErrors.
_FAILURES = (RuntimeError, OSError, ValueError)
_NCCL_POLL_S = 20e-6
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_CLEAN_UP_ONLY = "2"
_environment = threading.Lock()


def backends() -> tuple[str, ...]:
    """Return the backends that this build of torch has."""
    if not distributed.is_available():
        return ()
    had = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    return tuple(name for name, there in had.items() if there)


# When another thread has written something to a GPU; None: it is there.
Written = torch.cuda.Event | None


class _Group(Protocol):
    """A connected group: one thread calls ``send``, one ``receive``, and any may ``abort``."""

    def send(self, piece: Tensor, written: Written) -> None: ...

    def receive(self, piece: Tensor) -> None: ...

    def linger(self, timeout_s: float) -> None: ...

    def abort(self) -> None: ...


class Pair:
    """One side of a pair: the host calls `open`, both `join`, then use it until `abort`."""

    def __init__(self, peer: str, backend: str, device: torch.device) -> None:
        """Make an unconnected pair. Raises CallError if ``device`` lacks ``backend`` here."""
        if backend not in backends():
            raise CallError(
                f"group: {backend!r} is not a backend of this build of torch, which has "
                f"{', '.join(backends()) or 'none'}"
            )
        if backend == "nccl" and device.type != "cuda":
            raise CallError(
                f"group: nccl needs a CUDA device on both sides, but this side has {device}"
            )
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
        """Listen on ``bind``, an IP, for the other side; return the address to `join`."""
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as listening:
                listening.bind((bind, 0))
                listening.listen()
                port = listening.getsockname()[1]
                # Given a descriptor, the store owns it; without one it would listen on every
                # interface.
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

    def written(self) -> Written:
        """Return when what this thread has written to a `buffer` will be there."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def send(self, piece: Tensor, written: Written = None) -> None:
        """Wait until the other side takes ``piece``. Raises HostLost, and aborts the pair."""
        try:
            self._connected().send(piece, written)
        except _FAILURES as error:
            raise self._lost(error) from error

    def receive(self, size: int) -> Tensor:
        """Wait for the next ``size`` bytes. Raises HostLost, and aborts the pair."""
        whole = self.buffer(size)
        try:
            for piece in pieces(whole):
                self._connected().receive(piece)
        except _FAILURES as error:
            raise self._lost(error) from error
        return whole

    def linger(self, timeout_s: float) -> None:
        """Wait until the other side has ended the pair, before `abort`.

        A send returns when the bytes are on their way; this makes sure that the last ones arrive.
        """
        group = self._group
        if group is not None:
            group.linger(timeout_s)

    def abort(self) -> None:
        """End waiting operations here and, if it is alive, on the other side. From any thread."""
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
        """Wait for the group, as a router may send its first call while both sides still meet."""
        self._met.wait(MEET_TIMEOUT_S)
        group = self._group
        if group is None:
            raise HostLost(f"{self.peer}: there is no group with this peer")
        return group

    def _lost(self, error: Exception) -> HostLost:
        self.abort()
        # Drop the traceback: a caller that keeps the error would keep the group alive through it.
        error.__traceback__ = None
        # Keep the first line only: torch appends C++ stack frames.
        reason = str(error).partition("\n")[0]
        return HostLost(f"{self.peer}: {self._backend}: {reason}")


def pieces(payload: Tensor) -> Iterator[Tensor]:
    """Yield ``payload`` (uint8) in pieces, in the order of sending; none if it is empty."""
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
    """Return the IP of this machine that ``host`` sees; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(address)
        return sock.getsockname()[0]


class _Gloo:
    def __init__(self, store: Any, rank: int, bind: str) -> None:
        options = _dist.ProcessGroupGloo._Options()
        # A gloo device for this group alone: its thread and its sockets end with the group.
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=bind, lazy_init=False)]
        options._threads = 1  # these serve collectives, which are not used
        options._timeout = timedelta(seconds=MEET_TIMEOUT_S)
        self._group = _dist.ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank

    def send(self, piece: Tensor, written: Written) -> None:
        self._group.send([piece], self._peer, 0).wait(timedelta(seconds=OP_TIMEOUT_S))

    def receive(self, piece: Tensor) -> None:
        self._group.recv([piece], self._peer, 0).wait(timedelta(seconds=OP_TIMEOUT_S))

    def linger(self, timeout_s: float) -> None:
        nothing = torch.empty(1, dtype=torch.uint8)
        # Nothing is ever sent with this tag: the receive times out, or the other side closes.
        with contextlib.suppress(RuntimeError):
            waiting = self._group.recv([nothing], self._peer, _ABORT_TAG)
            waiting.wait(timedelta(seconds=timeout_s))

    def abort(self) -> None:
        # The receive times out, and with that gloo closes all connections of the group.
        self.linger(0.001)


class _Nccl:
    """The group over NCCL. Machines without CUDA cannot test it: see docs/design.md."""

    def __init__(self, store: Any, rank: int, device: torch.device) -> None:
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
        self._device = device
        self._peer = 1 - rank
        # One communicator for each direction: the operations of a communicator run one after the
        # other, so two sides that both send before they receive would deadlock.
        with _without_teardown():
            groups = [self._make(_dist.PrefixStore(n, store), rank) for n in ("answers", "calls")]
        self._out, self._in = groups if rank == HOST_RANK else reversed(groups)
        # The first operation connects, which can be slow: do it now, not during a call.
        first = torch.zeros(1, dtype=torch.uint8, device=device)
        for receives in (rank == HOST_RANK, rank != HOST_RANK):
            if receives:
                self.receive(first)
            else:
                self.send(first, None)

    def _make(self, store: Any, rank: int) -> Any:
        nccl = _dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=2 * OP_TIMEOUT_S)  # `_finish` times out first
        return nccl(store, rank, 2, options)

    def send(self, piece: Tensor, written: Written) -> None:
        if written is not None:
            # The group's own stream begins after what the current stream waits for.
            torch.cuda.current_stream(self._device).wait_event(written)
        self._finish(self._out.send([piece], self._peer, 0))

    def receive(self, piece: Tensor) -> None:
        self._finish(self._in.recv([piece], self._peer, 0))

    def _finish(self, work: Any) -> None:
        """Wait until the operation is complete on the device; `Work.wait` only orders streams."""
        until = time.monotonic() + OP_TIMEOUT_S
        while not work.is_completed():
            if time.monotonic() > until:
                raise RuntimeError(f"timed out after {OP_TIMEOUT_S:g} s")
            time.sleep(_NCCL_POLL_S)
        work.wait()

    def linger(self, timeout_s: float) -> None:
        """Do nothing, as NCCL does not tell when the other side has closed."""

    def abort(self) -> None:
        for group in (self._out, self._in):
            group.abort()


@contextlib.contextmanager
def _without_teardown() -> Iterator[None]:
    """Keep torch from ending the whole process when a peer of an NCCL group is lost.

    Groups read this environment variable when they are made. A value that the user set stays.
    """
    with _environment:
        if _ERROR_HANDLING in os.environ:
            yield
            return
        os.environ[_ERROR_HANDLING] = _CLEAN_UP_ONLY
        try:
            yield
        finally:
            del os.environ[_ERROR_HANDLING]
