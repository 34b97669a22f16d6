"""Weights between hosts, and from a trunk to a host, over connections of their own.

An expert travels as the bytes of one safetensors file, in chunks; the first chunk has its size and
checksum. The receiver uses nothing before both are right, and keeps nothing that is larger than the
named expert of this model can be. A client that puts an expert shows the controller's grant for it
(`ClusterSecret.grant`). A host limits the number of its transfers in each direction, and the bytes
of all together; a stalled transfer is ended.
"""

from __future__ import annotations

import contextlib
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

import grpc
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ....cluster.expert_keys import ExpertKey, ExpertVersion
from ....proto.errors import Busy, CallError
from ....proto.expert_pb2 import PutWeightsResult, WeightsChunk, WeightsKey
from ....proto.expert_pb2_grpc import WeightsServicer, WeightsStub
from ....proto.keys import Grant, secret_of_process
from ....proto.limits import CHUNK_BYTES, MAX_GETS, MAX_PUTS, MAX_WEIGHTS_BYTES
from ..budget import Share, SharedLimit
from .border import CHANNEL_OPTIONS, CLOSE_S, aborting, close_channel, from_grpc
from .interceptors import show_proof
from .stalls import StallWatcher

# Names in the metadata of a Put; gRPC sends metadata as bytes if its name ends with -bin.
_GRANT, _TERM = "moesaic-grant-bin", "moesaic-term"
# Pause between two attempts at a host that has no room for another transfer.
_PAUSE_S = 0.05

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


def put_weights(
    address: str,
    given: ExpertVersion,
    tensors: Mapping[str, Tensor],
    *,
    timeout_s: float,
    grant: Grant | None = None,
    proof: bytes | None = None,
) -> None:
    """Send an expert to the host at ``address``; the host serves it when this returns.

    If the host has no room for the transfer, retry. ``grant`` is the controller's grant; ``proof``
    is what the host asks every client for (None: the proof for a listener of this process).

    Raises what the host's store raises, Unauthenticated, Expired, and HostLost if the host is lost.
    """
    named = _to_wire(given)
    data = _save(tensors)
    shown = [] if grant is None else [(_TERM, str(grant.term)), (_GRANT, grant.proof)]

    def put(left_s: float) -> None:
        with _stub(address, proof) as stub:
            # As a future: a plain call would wait for a stuck chunk even after its deadline.
            stub.Put.future(_split(named, data), timeout=left_s, metadata=shown).result()

    _until_there_is_room(put, timeout_s)


def get_weights(
    address: str,
    wanted: ExpertVersion,
    *,
    timeout_s: float,
    max_bytes: int,
    proof: bytes | None = None,
) -> dict[str, Tensor]:
    """Copy an expert from the host at ``address``; ``proof`` is as in `put_weights`.

    If the host has no room for the transfer, retry. Raises NotHere if the host lacks the expert,
    CallError if the file is announced or arrives larger than ``max_bytes``, or is damaged,
    Unauthenticated, Expired, and HostLost if the host is lost.
    """

    def get(left_s: float) -> bytes:
        with _stub(address, proof) as stub:
            chunks = stub.Get(_to_wire(wanted), timeout=left_s)
            return _join(_head(chunks), chunks, max_bytes)

    return _load(_until_there_is_room(get, timeout_s))


def _until_there_is_room(transfer: Callable[[float], T], timeout_s: float) -> T:
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
    """A host's side of transfers: it serves ``store``."""

    def __init__(self, store: WeightsStore, stalls: StallWatcher) -> None:
        self._store = store
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
                given = _from_wire(head.key)
                self._store.check_grant(given, _shown(context))
                most = self._store.most_bytes(given.key)
                data = _join(head, request_iterator, most, moved=progress.moved, take=room.take)
            self._store.put(given, _load(data))
            return PutWeightsResult(bytes=len(data))

    def Get(  # noqa: N802
        self, request: WeightsKey, context: grpc.ServicerContext
    ) -> Iterator[WeightsChunk]:
        with aborting(context), self._gets.holding(), self._room() as room:
            wanted = _from_wire(request)
            room.take(self._store.most_bytes(wanted.key))
            data = _save(self._store.get(wanted))
            with self._stalls.watching(context.cancel) as progress:
                for chunk in _split(request, data):
                    yield chunk
                    progress.moved()

    @contextlib.contextmanager
    def _room(self) -> Iterator[Share]:
        share = self._bytes.share()
        try:
            yield share
        finally:
            share.close()


def _to_wire(weights: ExpertVersion) -> WeightsKey:
    (model, layer, expert), version = weights
    return WeightsKey(model=model, layer=layer, expert=expert, version=version)


def _from_wire(key: WeightsKey) -> ExpertVersion:
    return ExpertVersion(ExpertKey(key.model, key.layer, key.expert), key.version)


def _shown(context: grpc.ServicerContext) -> Grant | None:
    shown = dict(context.invocation_metadata() or ())
    term, proof = shown.get(_TERM), shown.get(_GRANT)
    if not isinstance(proof, bytes) or not str(term).isdecimal():
        return None
    return Grant(int(str(term)), proof)


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CallError(f"weights: the bytes are not a safetensors file: {error}") from error


def _split(key: WeightsKey, data: bytes) -> Iterator[WeightsChunk]:
    yield WeightsChunk(
        key=key, total_bytes=len(data), crc32=zlib.crc32(data), data=data[:CHUNK_BYTES]
    )
    for start in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
        yield WeightsChunk(data=data[start : start + CHUNK_BYTES])


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
) -> bytes:
    """Join the chunks to the bytes of a whole file.

    Raises CallError if they differ from the announcement. ``take`` is called with the size before
    anything is kept, and may raise Busy.
    """
    total = head.total_bytes
    if total > max_bytes:
        raise CallError(
            f"total_bytes: {total} bytes of weights were announced, but an expert of this model "
            f"has at most {max_bytes}"
        )
    take(total)
    parts, size, crc32 = [], 0, 0
    chunk: WeightsChunk | None = head
    while chunk is not None:
        size += len(chunk.data)
        if size > total or not chunk.data:
            raise CallError(
                f"total_bytes: {total} bytes of weights were announced, but {size} have arrived, "
                f"{len(chunk.data)} of them in the last chunk"
            )
        parts.append(chunk.data)
        crc32 = zlib.crc32(chunk.data, crc32)
        moved()
        chunk = next(rest, None)
    if size < total:
        raise CallError(f"total_bytes: {total} bytes of weights were announced, but {size} arrived")
    if crc32 != head.crc32:
        raise CallError(f"crc32: the weights have {crc32:#x}, but {head.crc32:#x} was announced")
    return b"".join(parts)
