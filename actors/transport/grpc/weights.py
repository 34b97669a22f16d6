"""Weights between hosts, and from a trunk to a host, over connections of their own.

An expert travels as the bytes of one safetensors file, in chunks; the first chunk has its size and
checksum. The receiver uses nothing before both are right, and keeps nothing that is larger than the
named expert of this model can be. A client that puts an expert shows the controller's grant for it
(`ClusterSecret.grant`). A host limits the number of its transfers in each direction, and the bytes
of all together; a stalled transfer is ended.

Tensors of a training run (`BulkKey`) travel in the same way, to and from a store of their own. They
need no grant: hosts serve none of them before the run has them commit.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

import grpc
import numpy as np
import xxhash
from torch import Tensor

from ....cluster.expert_keys import ExpertKey, ExpertVersion
from ....cluster.training.contributions import Attempt
from ....cluster.training.orders import BulkKey
from ....proto.errors import Busy, CallError, ClusterError, Corrupted
from ....proto.expert_pb2 import PutWeightsResult, WeightsChunk, WeightsKey
from ....proto.expert_pb2_grpc import WeightsServicer, WeightsStub
from ....proto.keys import Grant, secret_of_process
from ....proto.limits import CHUNK_BYTES, MAX_GETS, MAX_PUTS, MAX_WEIGHTS_BYTES
from ..budget import Share, SharedLimit
from ..tensor_bytes import TensorBytes, new_memory, tensors_in
from .border import CHANNEL_OPTIONS, CLOSE_S, aborting, close_channel, from_grpc
from .interceptors import show_proof
from .stalls import StallWatcher

# Names in the metadata of a Put; gRPC sends metadata as bytes if its name ends with -bin.
_GRANT, _TERM = "moesaic-grant-bin", "moesaic-term"
# Pause between two attempts at a host that has no room for another transfer.
_PAUSE_S = 0.05
_KINDS: dict[Literal["weights", "gradient", "state"], WeightsKey.Kind] = {
    "weights": WeightsKey.WEIGHTS,
    "gradient": WeightsKey.GRADIENT,
    "state": WeightsKey.STATE,
}
_KIND_OF: dict[int, Literal["weights", "gradient", "state"]] = {
    wire: kind for kind, wire in _KINDS.items()
}

T = TypeVar("T")


class WeightsStore(Protocol):
    """A host's store of weights; several of gRPC's threads call it at the same time."""

    def most_bytes(self, key: ExpertKey) -> int:
        """Return the largest size of a file with this expert.

        Raises NotHere if the model is unknown, and CallError if it has no such expert.
        """
        ...

    def check_grant(self, given: ExpertVersion, grant: Grant | None) -> None:
        """Check that the controller granted this put.

        Raises Forbidden if it did not, and Superseded if a newer controller rules.
        """
        ...

    def get(self, wanted: ExpertVersion) -> Mapping[str, Tensor]:
        """Return the tensors of an expert. Raises NotHere."""
        ...

    def put(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> None:
        """Keep an expert and serve it.

        Raises NotHere if the model is unknown, CallError if the tensors do not fit it or are not
        finite, and Forbidden if they would replace others that are being served.
        """
        ...


class BulkStore(Protocol):
    """A host's store of a training run's tensors; several threads call it at the same time."""

    def most_bytes(self, key: BulkKey) -> int:
        """Return the largest size of a file with these tensors. Raises NotHere and CallError."""
        ...

    def reading(self, wanted: BulkKey) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Give tensors that do not change inside the block. Raises NotHere and CallError."""
        ...

    def put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors over. They lie in one allocation, which is freed with the last of them.

        What is put once more is accepted. Raises NotHere, CallError and Busy.
        """
        ...


def put_weights(
    address: str,
    given: ExpertVersion | BulkKey,
    tensors: Mapping[str, Tensor],
    *,
    timeout_s: float,
    grant: Grant | None = None,
    proof: bytes | None = None,
) -> None:
    """Send tensors to the host at ``address``; the host serves an expert when this returns.

    If the host has no room for the transfer, retry. ``grant`` is the controller's grant; ``proof``
    is what the host asks every client for (None: the proof for a listener of this process).

    Raises what the host's store raises, Unauthenticated, Expired, and HostLost if the host is lost.
    """
    named = key_to_wire(given)
    data = _save(tensors)
    shown = [] if grant is None else [(_TERM, str(grant.term)), (_GRANT, grant.proof)]

    def put(left_s: float) -> None:
        with _stub(address, proof) as stub:
            # As a future: a plain call would wait for a stuck chunk even after its deadline.
            stub.Put.future(_split(named, data), timeout=left_s, metadata=shown).result()

    until_there_is_room(put, timeout_s)


def get_weights(
    address: str,
    wanted: ExpertVersion | BulkKey,
    *,
    timeout_s: float,
    max_bytes: int,
    proof: bytes | None = None,
) -> dict[str, Tensor]:
    """Copy tensors from the host at ``address``; ``proof`` is as in `put_weights`.

    If the host has no room for the transfer, retry. Raises NotHere if the host lacks them,
    CallError if the file is announced or arrives larger than ``max_bytes``, or is none, Corrupted
    if it is damaged, Unauthenticated, Expired, and HostLost if the host is lost.
    """

    def get(left_s: float) -> np.ndarray:
        with _stub(address, proof) as stub:
            chunks = stub.Get(key_to_wire(wanted), timeout=left_s)
            return _join(_head(chunks), chunks, max_bytes)

    return tensors_in(until_there_is_room(get, timeout_s))


def until_there_is_room(transfer: Callable[[float], T], timeout_s: float) -> T:
    """Retry ``transfer`` while it raises Busy, for ``timeout_s`` at most."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return transfer(max(until - time.monotonic(), 1e-3))
        except Busy:
            pause_s = _PAUSE_S * (1 + random.random())
            if time.monotonic() + pause_s >= until:
                raise
        time.sleep(pause_s)


@contextlib.contextmanager
def _stub(address: str, proof: bytes | None) -> Iterator[WeightsStub]:
    """Open a connection for weights alone, so that tokens never queue after them."""
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    try:
        yield WeightsStub(show_proof(channel, proof or secret_of_process().proof("weights", "")))
    except grpc.RpcError as error:
        raise from_grpc(error, address) from error
    finally:
        close_channel(channel, CLOSE_S)


class Weights(WeightsServicer):
    """A host's side of transfers: it serves experts of ``store``, and a run's tensors of ``bulk``.

    Without one of them, transfers of its kind are refused.
    """

    def __init__(
        self, store: WeightsStore | None, bulk: BulkStore | None, stalls: StallWatcher
    ) -> None:
        self._experts = store
        self._tensors = bulk
        self._stalls = stalls
        self._puts = SharedLimit(MAX_PUTS, "transfers of weights to this host")
        self._gets = SharedLimit(MAX_GETS, "transfers of weights from this host")
        self._bytes = SharedLimit(MAX_WEIGHTS_BYTES, "bytes of weights in transfer")

    def Put(  # noqa: N802
        self, request_iterator: Iterator[WeightsChunk], context: grpc.ServicerContext
    ) -> PutWeightsResult:
        with aborting(context), self._puts.holding(), self._room() as room:
            with self._stalls.watching(context.cancel) as progress:
                head = _head(request_iterator)
                given = key_from_wire(head.key)
                if isinstance(given, ExpertVersion):
                    self._store.check_grant(given, _shown(context))
                most = self._most_bytes(given)
                data = _join(head, request_iterator, most, moved=progress.moved, take=room.take)
            if isinstance(given, ExpertVersion):
                self._store.put(given, tensors_in(data))
            else:
                self._bulk.put(given, tensors_in(data))
            return PutWeightsResult(bytes=len(data))

    def Get(  # noqa: N802
        self, request: WeightsKey, context: grpc.ServicerContext
    ) -> Iterator[WeightsChunk]:
        with aborting(context), self._gets.holding(), self._room() as room:
            wanted = key_from_wire(request)
            room.take(self._most_bytes(wanted))
            if isinstance(wanted, ExpertVersion):
                data = _save(self._store.get(wanted))
            else:
                # A slow client must not keep the tensors from changing: they are copied.
                with self._bulk.reading(wanted) as tensors:
                    data = _save(tensors)
            with self._stalls.watching(context.cancel) as progress:
                for chunk in _split(request, data):
                    yield chunk
                    progress.moved()

    def _most_bytes(self, key: ExpertVersion | BulkKey) -> int:
        if isinstance(key, ExpertVersion):
            return self._store.most_bytes(key.key)
        return self._bulk.most_bytes(key)

    @property
    def _store(self) -> WeightsStore:
        if self._experts is None:
            raise ClusterError("key: this host has no experts")
        return self._experts

    @property
    def _bulk(self) -> BulkStore:
        if self._tensors is None:
            raise ClusterError("kind: this host has no tensors of training runs")
        return self._tensors

    @contextlib.contextmanager
    def _room(self) -> Iterator[Share]:
        share = self._bytes.share()
        try:
            yield share
        finally:
            share.close()


def key_to_wire(key: ExpertVersion | BulkKey) -> WeightsKey:
    """Return the message that names tensors."""
    (model, layer, expert), version = key.key, key.version
    wire = WeightsKey(model=model, layer=layer, expert=expert, version=version)
    if isinstance(key, BulkKey):
        wire.kind, wire.run, wire.source = _KINDS[key.kind], key.run, key.source
        if key.attempt is not None:
            run, step, number = key.attempt
            wire.attempt.run, wire.attempt.step, wire.attempt.number = run, step, number
    return wire


def key_from_wire(wire: WeightsKey) -> ExpertVersion | BulkKey:
    """Return the key that a message names. Raises CallError for an unknown kind."""
    key = ExpertKey(wire.model, wire.layer, wire.expert)
    if wire.kind == WeightsKey.EXPERT:
        return ExpertVersion(key, wire.version)
    if wire.kind not in _KIND_OF:
        raise CallError(f"kind: {wire.kind} is not one of {', '.join(_KINDS)}")
    of, attempt = wire.attempt, None
    if wire.HasField("attempt"):
        attempt = Attempt(of.run, of.step, of.number)
    kind = _KIND_OF[wire.kind]
    return BulkKey(kind, key, wire.version, attempt, source=wire.source, run=wire.run)


def _shown(context: grpc.ServicerContext) -> Grant | None:
    shown = dict(context.invocation_metadata() or ())
    term, proof = shown.get(_TERM), shown.get(_GRANT)
    if not isinstance(proof, bytes) or not str(term).isdecimal():
        return None
    return Grant(int(str(term)), proof)


def _save(tensors: Mapping[str, Tensor]) -> np.ndarray:
    file = TensorBytes(tensors)
    data = new_memory(file.nbytes)
    for _ in file.write(data):
        pass
    return data


def _split(key: WeightsKey, data: np.ndarray) -> Iterator[WeightsChunk]:
    head = WeightsChunk(
        key=key, total_bytes=len(data), checksum=xxhash.xxh3_64_intdigest(data.data)
    )
    for start in range(0, len(data), CHUNK_BYTES):
        head.data = data[start : start + CHUNK_BYTES].tobytes()
        yield head
        head = WeightsChunk()


def _head(chunks: Iterator[WeightsChunk]) -> WeightsChunk:
    """Return the first chunk. Raises CallError if it does not name an expert."""
    head = next(chunks, None)
    if head is None or not head.HasField("key"):
        raise CallError("key: the first chunk of weights does not name an expert")
    return head


def _join(
    head: WeightsChunk,
    rest: Iterator[WeightsChunk],
    max_bytes: int,
    *,
    moved: Callable[[], None] = lambda: None,
    take: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Join the chunks to the bytes of a whole file.

    Raises CallError if they differ from the announcement, and Corrupted if only the checksum does.
    ``take`` is called with the size before anything is kept, and may raise Busy.
    """
    total = head.total_bytes
    if total > max_bytes:
        raise CallError(
            f"total_bytes: {total} bytes of weights were announced, but those of this key have at "
            f"most {max_bytes}"
        )
    take(total)
    whole, size = new_memory(total), 0
    chunk: WeightsChunk | None = head
    while chunk is not None:
        data = chunk.data  # each access makes a copy
        if size + len(data) > total or not data:
            raise CallError(
                f"total_bytes: {total} bytes of weights were announced, but {size + len(data)} "
                f"have arrived, {len(data)} of them in the last chunk"
            )
        whole[size : size + len(data)] = np.frombuffer(data, np.uint8)
        size += len(data)
        moved()
        chunk = next(rest, None)
    if size < total:
        raise CallError(f"total_bytes: {total} bytes of weights were announced, but {size} arrived")
    checksum = xxhash.xxh3_64_intdigest(whole.data)
    if checksum != head.checksum:
        raise Corrupted(
            f"checksum: the weights have {checksum:#x}, but {head.checksum:#x} was announced"
        )
    return whole
