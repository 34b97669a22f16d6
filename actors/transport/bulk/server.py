"""A host's side of the bulk path: it serves a training run's tensors to processes of its node.

It has an address and threads of its own, one for each connection, so the host's loop knows nothing
of it. No thread waits for a client while it holds anything of the store's. A client that sends
nothing in the middle of a put, or asks for nothing for a while, is ended.

Who connects must belong to the same user, and show the cluster's proof for this host before
anything else that it sends is looked at.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import xxhash

from ....cluster.training.orders import BulkKey
from ....kernels.slabs.checksum import copy_and_digest
from ....proto.errors import (
    Busy,
    CallError,
    HostLost,
    InternalError,
    MoesaicError,
    Retryable,
    Unauthenticated,
    describe_error,
)
from ....proto.expert_pb2 import Bulk, Refusal, WeightsKey
from ....proto.keys import ClusterSecret, secret_of_process
from ....proto.limits import (
    BULK_IDLE_S,
    HELLO_S,
    MAX_BULK_BYTES,
    MAX_BULK_CONNECTIONS,
    MAX_WEIGHTS_BYTES,
)
from ....proto.unix_peers import same_user
from ..base import check_version
from ..budget import SharedLimit
from ..grpc.weights import BulkStore, key_from_wire
from ..seqpacket import close_all
from ..tensor_bytes import TensorBytes, new_memory, tensors_in
from .datagrams import BulkSocket, receive_file, send_file
from .lent_memory import BorrowedMemories, BorrowedMemory, from_wire
from .shared import SharedMemory, map_memory

# A client that has begun a put says within this time how far it is.
STALL_S = 5.0
_CLOSE_S = 0.5
_PAUSE_S = 0.1
_MESSAGE_CHARS = 2000

log = logging.getLogger(__name__)


class BulkServer:
    """Listens at an abstract Unix socket with a random name, so that there is no file."""

    def __init__(
        self, store: BulkStore, *, secret: ClusterSecret | None = None, target: str = ""
    ) -> None:
        """Serve ``store`` to members of the cluster that has ``secret`` (None: of this process).

        Their proof must be for ``target`` (`keys.target`).
        """
        self._store = store
        self._proof = (secret or secret_of_process()).proof("bulk", target)
        self._arriving = SharedLimit(MAX_WEIGHTS_BYTES, "bytes of tensors that are put")
        self._borrowed = BorrowedMemories()
        self._lock = threading.Lock()
        self._serving: dict[threading.Thread, _Connection] = {}
        self._closed = threading.Event()
        self.address = f"moesaic-bulk-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.bind("\0" + self.address)
        self._listener.listen(128)
        self._accepting = threading.Thread(target=self._accept, name="bulk-accept", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """End all connections, and wait a moment for their threads."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self._accepting.join(_CLOSE_S)
        self._listener.close()
        with self._lock:
            serving = dict(self._serving)
        for connection in serving.values():
            connection.end()
        until = time.monotonic() + _CLOSE_S
        for thread in serving:
            thread.join(max(0.0, until - time.monotonic()))

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closed.is_set():
                    # This process may be out of descriptors.
                    log.warning("bulk path: cannot accept a connection: %s", error)
                    self._closed.wait(_PAUSE_S)
                continue
            if same_user(sock):
                self._admit(BulkSocket(sock, "a client"))
            else:
                sock.close()

    def _admit(self, sock: BulkSocket) -> None:
        connection = _Connection(sock, self._store, self._proof, self._arriving, self._borrowed)
        thread = threading.Thread(target=self._serve, args=(connection,), name="bulk", daemon=True)
        try:
            with self._lock:
                if len(self._serving) >= MAX_BULK_CONNECTIONS:
                    raise Busy(f"bulk path: {MAX_BULK_CONNECTIONS} connections are in use")
                self._serving[thread] = connection
            thread.start()
        except (Busy, RuntimeError) as error:  # RuntimeError: the system starts no more threads
            log.warning("bulk path: a connection is refused: %s", error)
            with self._lock:
                self._serving.pop(thread, None)
            with contextlib.suppress(HostLost):
                sock.send(_refusal(0, error if isinstance(error, Busy) else Busy(str(error))))
            sock.close()

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
        except Retryable as error:
            log.debug("bulk path: a connection has ended: %s", error)
        except Exception:
            log.exception("bulk path: a connection ended with an unexpected error")
        finally:
            connection.close()
            with self._lock:
                del self._serving[threading.current_thread()]


class _Connection:
    """One connection of a client, served by a thread of its own."""

    def __init__(
        self,
        sock: BulkSocket,
        store: BulkStore,
        proof: bytes,
        arriving: SharedLimit,
        borrowed: BorrowedMemories,
    ) -> None:
        self._sock = sock
        self._store = store
        self._proof = proof
        self._arriving = arriving
        self._borrowed = borrowed
        self._lent: BorrowedMemory | None = None  # that the client lent last, and lends again
        self._memory: SharedMemory | None = None
        self._refused = 0  # the put that was refused, while its client still writes

    def serve(self) -> None:
        """Answer requests until the connection ends. Raises Expired or HostLost then."""
        hello, fds = self._sock.receive(time.monotonic() + HELLO_S)
        close_all(fds)
        try:
            if not hmac.compare_digest(hello.hello.proof, self._proof):
                raise Unauthenticated(
                    "proof: it is missing, or belongs to another cluster, host or incarnation; "
                    "only members of the cluster may connect to its hosts"
                )
            check_version(hello.hello.wire_version, "the client")
        except MoesaicError as error:
            self._sock.send(_refusal(0, error))
            return
        while True:
            message, fds = self._sock.receive(time.monotonic() + BULK_IDLE_S)
            try:
                self._serve_one(message, fds)
            finally:
                close_all(fds)

    def _serve_one(self, message: Bulk, fds: list[int]) -> None:
        kind = message.WhichOneof("kind")
        if kind == "lend":
            self._answer(message.lend.seq, partial(self._borrow, message.lend, fds))
            return
        self._take_memory(fds)
        match kind:
            case "get":
                self._answer(message.get.seq, partial(self._get, message.get))
            case "put":
                self._answer(message.put.seq, partial(self._put, message.put))
            case "written" if message.written.seq == self._refused:
                return
            case _:
                raise HostLost(f"a client sent {kind}, which is no request")

    def end(self) -> None:
        """Shut the connection down, from any thread."""
        self._sock.end()

    def close(self) -> None:
        self._sock.close()
        self._lent = None
        if self._memory is not None:
            self._memory.close()

    def _take_memory(self, fds: list[int]) -> None:
        if fds:
            memory = map_memory(fds[0])
            if self._memory is not None:
                self._memory.close()
            self._memory = memory

    def _answer(self, seq: int, answer: Callable[[], None]) -> None:
        try:
            answer()
        except Exception as error:
            # Whatever it is, the client gets a refusal; if it has gone, sending raises HostLost.
            if not isinstance(error, MoesaicError):
                log.exception("bulk path: a request failed with an unexpected error")
                error = InternalError(describe_error(error))
            self._refused = seq
            self._sock.send(_refusal(seq, error))

    def _get(self, get: Bulk.Get) -> None:
        with self._store.reading(_key(get.key)) as tensors:
            file = TensorBytes(tensors)
            if file.nbytes > MAX_BULK_BYTES:
                raise CallError(
                    f"key: its {file.nbytes} bytes are more than the {MAX_BULK_BYTES} of one "
                    "transfer"
                )
            if self._memory is None or len(self._memory.octets) < file.nbytes:
                wanted = Bulk.TooSmall(seq=get.seq, total_bytes=file.nbytes)
                self._sock.send(Bulk(too_small=wanted))
            elif not self._sock.has_ended():  # the client waits still
                send_file(self._sock, get.seq, file, self._memory.octets)

    def _put(self, put: Bulk.Put) -> None:
        given, total = _key(put.key), put.total_bytes
        most = self._store.most_bytes(given)
        room = 0 if self._memory is None else len(self._memory.octets)
        if self._memory is None or not 0 < total <= min(most, room):
            raise CallError(
                f"total_bytes: {total} bytes were announced, but those of this key have at most "
                f"{most}, and the client's memory {room}"
            )
        shared = self._memory.octets
        with self._arriving.holding(total):
            # The client may change its memory at any time: nothing but the copy is looked at.
            own = new_memory(total)

            def read(begin: int, end: int, digest: xxhash.xxh3_64) -> None:
                copy_and_digest(shared[begin:end], own[begin:end], digest)

            receive_file(self._written(), total, self._written, read)
            self._store.put(given, tensors_in(own))
        self._sock.send(Bulk(done=Bulk.Done(seq=put.seq)))

    def _borrow(self, lend: Bulk.Lend, fds: list[int]) -> None:
        """Take gradients over that stay in the client's memory, and that it may change.

        After an error those before it are taken over.
        """
        if len(fds) != 1:
            raise CallError("the descriptor of the memory is missing")
        self._lent = lent = self._borrowed.of(fds[0])
        for one in lend.gradients:
            given, tensors = _key(one.key), from_wire(one.tensors)
            if given.kind != "gradient":
                raise CallError(
                    f"kind: {given.kind} of {given.key} must be put as a copy; only "
                    "gradients are read in the client's memory"
                )
            total, most = sum(each.nbytes for each in tensors), self._store.most_bytes(given)
            if total > most or len({each.name for each in tensors}) < len(tensors):
                raise CallError(
                    f"tensors: {total} bytes, but those of this key have at most {most}; or a name "
                    "comes twice"
                )
            self._store.put(given, lent.tensors(tensors))
        self._sock.send(Bulk(done=Bulk.Done(seq=lend.seq)))

    def _written(self) -> Bulk.Written:
        """Wait for the client to go on with its put; end the connection if it does not."""
        try:
            message, fds = self._sock.receive(time.monotonic() + STALL_S)
            close_all(fds)
            if message.WhichOneof("kind") != "written":
                raise HostLost("a client sent something else in the middle of a put")
        except Retryable:
            self._sock.end()
            raise
        return message.written


def _key(wire: WeightsKey) -> BulkKey:
    key = key_from_wire(wire)
    if not isinstance(key, BulkKey):
        raise CallError("kind: only tensors of a training run travel on this path")
    return key


def _refusal(seq: int, error: MoesaicError) -> Bulk:
    refusal = Refusal(seq=seq, code=error.code, message=str(error)[:_MESSAGE_CHARS])
    return Bulk(refusal=refusal)
