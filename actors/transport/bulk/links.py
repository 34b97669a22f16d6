"""A client's side of the bulk path: tensors of a training run, from and to any host.

Hosts of the same node are reached over shared memory, all others over gRPC. A connection and its
memory are kept for the next transfer, because memory that is used for the first time costs more
than the copy.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xxhash
from torch import Tensor

from ....cluster.placement import HostEntry
from ....cluster.training.orders import BulkKey
from ....proto.errors import HostLost, from_wire
from ....proto.expert_pb2 import Bulk
from ....proto.keys import ClusterSecret, secret_of_process
from ....proto.limits import BULK_IDLE_S, MAX_BULK_BYTES, MAX_KEPT_BYTES
from ....proto.unix_peers import same_user
from ....proto.wire import WIRE_VERSION
from ..grpc.weights import get_weights, key_to_wire, put_weights, until_there_is_room
from ..seqpacket import close_all
from ..tensor_bytes import TensorBytes, tensors_in
from .datagrams import BulkSocket, receive_file, send_file
from .lent_memory import LentMemory, lending_messages
from .shared import SharedMemory, make_memory


class BulkLinks:
    """Connections to hosts, closed together. Several threads may use it at the same time."""

    def __init__(self, node: str, secret: ClusterSecret | None = None) -> None:
        """``node`` is where this process runs, and ``secret`` its cluster's (None: of itself)."""
        self._node = node
        self._secret = secret or secret_of_process()
        self._lock = threading.Lock()
        self._idle: list[_Link] = []  # the one used last is at the end
        self._busy: set[_Link] = set()
        self._closed = False

    @contextlib.contextmanager
    def get(
        self, entry: HostEntry, wanted: BulkKey, *, timeout_s: float
    ) -> Iterator[dict[str, Tensor]]:
        """Give tensors of a host, which are valid inside the block alone.

        If the host has no room for the transfer, retry. Raises what its store raises, CallError,
        Corrupted, Unauthenticated, Expired, and HostLost if the host is lost.
        """
        if not self.is_near(entry):
            yield get_weights(
                entry.grpc_address,
                wanted,
                timeout_s=timeout_s,
                max_bytes=MAX_BULK_BYTES,
                proof=self._secret.proof("weights", entry.target),
            )
            return

        def transfer(left_s: float) -> tuple[_Link, dict[str, Tensor]]:
            link = self._take(entry)
            try:
                return link, tensors_in(link.get(wanted, left_s))
            except BaseException:
                self._give_back(link)
                raise

        link, tensors = until_there_is_room(transfer, timeout_s)
        try:
            yield tensors
        finally:
            self._give_back(link)

    def put(
        self, entry: HostEntry, given: BulkKey, tensors: Mapping[str, Tensor], *, timeout_s: float
    ) -> None:
        """Give a host a copy of tensors. Raises what `get` raises."""
        if not self.is_near(entry):
            put_weights(
                entry.grpc_address,
                given,
                tensors,
                timeout_s=timeout_s,
                proof=self._secret.proof("weights", entry.target),
            )
            return

        def transfer(left_s: float) -> None:
            with self._taking(entry) as link:
                link.put(given, TensorBytes(tensors), left_s)

        until_there_is_room(transfer, timeout_s)

    def lend(
        self,
        entry: HostEntry,
        gradients: Mapping[BulkKey, Mapping[str, Tensor]],
        memory: LentMemory,
        *,
        timeout_s: float,
    ) -> None:
        """Let a host of this node read gradients where they lie in ``memory``, whenever it likes.

        Only this process knows when the host has ended. A copy of what does not lie there is put,
        and of what has so many tensors that they cannot be named in a message. Raises what `get`
        raises.
        """
        until = time.monotonic() + timeout_s
        messages, others = lending_messages(gradients, memory)

        def transfer(_: float) -> None:
            with self._taking(entry) as link:
                while messages:
                    left_s = max(until - time.monotonic(), 1e-3)
                    link.lend(messages[-1], memory.descriptor, left_s)
                    messages.pop()

        if messages:
            until_there_is_room(transfer, timeout_s)
        for key in others:
            self.put(entry, key, gradients[key], timeout_s=until - time.monotonic())

    def close(self) -> None:
        """End all connections. Tensors that are in use stay valid until the end of their block."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for link in self._busy:
                link.end()
        for link in idle:
            link.close()

    def is_near(self, entry: HostEntry) -> bool:
        """Return whether a host shares memory with this process."""
        return bool(entry.bulk_address) and entry.node == self._node

    def _take(self, entry: HostEntry) -> _Link:
        """Take an idle connection to this incarnation of a host, or make one.

        Those that are of no use any more are closed.
        """
        with self._lock:
            stale = [link for link in self._idle if link.is_stale(entry)]
            self._idle = [link for link in self._idle if link not in stale]
            fitting = [link for link in self._idle if link.address == entry.bulk_address]
            link = fitting[-1] if fitting else None
            if link is not None:
                self._idle.remove(link)
                self._busy.add(link)
        for each in stale:
            each.close()
        if link is None:
            link = _Link(entry, self._secret.proof("bulk", entry.target))
            with self._lock:
                self._busy.add(link)
                if self._closed:
                    link.end()
        return link

    @contextlib.contextmanager
    def _taking(self, entry: HostEntry) -> Iterator[_Link]:
        link = self._take(entry)
        try:
            yield link
        finally:
            self._give_back(link)

    def _give_back(self, link: _Link) -> None:
        over: list[_Link] = []
        with self._lock:
            self._busy.discard(link)
            if link.sound and not self._closed and link.nbytes <= MAX_KEPT_BYTES:
                self._idle.append(link)
            else:
                over.append(link)
            while sum(one.nbytes for one in self._idle) > MAX_KEPT_BYTES:
                over.append(self._idle.pop(0))
        for one in over:
            one.close()


class _Link:
    """A connection to one incarnation of a host, with the memory that it shares; for one thread."""

    def __init__(self, entry: HostEntry, proof: bytes) -> None:
        """Connect. Raises HostLost if no host of this user listens there."""
        self.host = entry.host
        self.address = entry.bulk_address
        # Whether the host has nothing more to say, or to write, about an earlier request.
        self.sound = False
        self._memory: SharedMemory | None = None
        self._descriptor: list[int] = []  # of memory that the host is yet to be given
        self._seq = 0
        self._used_at = time.monotonic()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect("\0" + self.address)
            if not same_user(sock):
                raise HostLost(f"{self.host}: the process that listens belongs to another user")
            self._sock = BulkSocket(sock, self.host)
        except OSError as error:
            sock.close()
            raise HostLost(f"{self.host}: cannot connect to its bulk path: {error}") from error
        except HostLost:
            sock.close()
            raise
        self._send(Bulk(hello=Bulk.Hello(wire_version=WIRE_VERSION, proof=proof)))

    @property
    def nbytes(self) -> int:
        """The size of the memory that this connection keeps."""
        return 0 if self._memory is None else len(self._memory.octets)

    def is_stale(self, entry: HostEntry) -> bool:
        """Return whether the connection is useless now that ``entry`` is a host's newest."""
        old = self.host == entry.host and self.address != entry.bulk_address
        return old or self._sock.has_ended() or time.monotonic() - self._used_at > BULK_IDLE_S

    def get(self, wanted: BulkKey, left_s: float) -> np.ndarray:
        """Let the host write tensors; return their bytes (uint8), valid until the next request."""
        until = time.monotonic() + left_s
        while (message := self._ask(wanted, until)).WhichOneof("kind") == "too_small":
            self.sound = True
            self._grow(message.too_small.total_bytes)
        first = self._written(message)
        total, octets = first.total_bytes, self._octets()
        if total > len(octets):
            raise HostLost(f"{self.host}: it says that it has written {total} bytes")

        def read(begin: int, end: int, digest: xxhash.xxh3_64) -> None:
            digest.update(octets[begin:end].data)

        receive_file(first, total, lambda: self._written(self._receive(until)), read)
        self.sound = True
        return octets[:total]

    def put(self, given: BulkKey, file: TensorBytes, left_s: float) -> None:
        """Write tensors and let the host take a copy."""
        until = time.monotonic() + left_s
        self._seq += 1
        self._grow(file.nbytes)
        put = Bulk.Put(seq=self._seq, key=key_to_wire(given), total_bytes=file.nbytes)
        self._send(Bulk(put=put))
        with contextlib.suppress(HostLost):  # what the host has said before it ended comes first
            send_file(self._sock, self._seq, file, self._octets())
        self._await_done(until)

    def lend(self, gradients: Sequence[Bulk.Gradient], descriptor: int, left_s: float) -> None:
        """Let the host read gradients in the memory of ``descriptor``, which stays the caller's."""
        until = time.monotonic() + left_s
        self._seq += 1
        self.sound = False
        self._used_at = time.monotonic()
        with contextlib.suppress(HostLost):  # what the host has said before it ended comes first
            self._sock.send(Bulk(lend=Bulk.Lend(seq=self._seq, gradients=gradients)), [descriptor])
        self._await_done(until)

    def _await_done(self, until: float) -> None:
        message = self._receive(until)
        if message.WhichOneof("kind") != "done" or message.done.seq != self._seq:
            raise HostLost(f"{self.host}: it answered a put with {message.WhichOneof('kind')}")
        self.sound = True

    def end(self) -> None:
        """Shut the connection down, from any thread."""
        self._sock.end()

    def close(self) -> None:
        self._sock.close()
        close_all(self._descriptor)
        self._descriptor = []
        if self._memory is not None:
            self._memory.close()

    def _octets(self) -> np.ndarray:
        return np.empty(0, np.uint8) if self._memory is None else self._memory.octets

    def _grow(self, nbytes: int) -> None:
        if nbytes <= self.nbytes:
            return
        descriptor, memory = make_memory(nbytes)
        close_all(self._descriptor)
        if self._memory is not None:
            self._memory.close()
        self._descriptor, self._memory = [descriptor], memory

    def _ask(self, wanted: BulkKey, until: float) -> Bulk:
        self._seq += 1
        self._send(Bulk(get=Bulk.Get(seq=self._seq, key=key_to_wire(wanted))))
        return self._receive(until)

    def _send(self, request: Bulk) -> None:
        """Send a request, and the memory that the host is yet to be given."""
        self.sound = False
        self._used_at = time.monotonic()
        with contextlib.suppress(HostLost):  # what the host has said before it ended comes first
            self._sock.send(request, self._descriptor)
        close_all(self._descriptor)
        self._descriptor = []

    def _receive(self, until: float) -> Bulk:
        """Wait for the host's next message about the request. Raises its refusal, too."""
        message, fds = self._sock.receive(until)
        close_all(fds)
        if message.WhichOneof("kind") == "refusal":
            refusal = message.refusal
            self.sound = refusal.seq == self._seq
            raise from_wire(refusal.code, f"{self.host}: {refusal.message}")
        return message

    def _written(self, message: Bulk) -> Bulk.Written:
        if message.WhichOneof("kind") != "written" or message.written.seq != self._seq:
            raise HostLost(f"{self.host}: it answered a get with {message.WhichOneof('kind')}")
        return message.written
