"""Weights between hosts, and from a trunk to a host: on connections of their own.

An expert travels as the bytes of one safetensors file, in chunks, with its size and checksum in
front. Nothing is believed before both are right.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import grpc
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ...cluster.placement import ExpertKey
from ...proto.errors import CallError
from ...proto.expert_pb2 import PutWeightsResult, WeightsChunk, WeightsKey
from ...proto.expert_pb2_grpc import WeightsServicer, WeightsStub, add_WeightsServicer_to_server
from ...proto.limits import CHUNK_BYTES
from .grpc_border import CHANNEL_OPTIONS, CLOSE_S, aborting, close_channel, from_grpc

# The experts of the largest models have half a gigabyte.
MAX_WEIGHTS_BYTES = 4 << 30


class WeightsStore(Protocol):
    """What a host does with weights; called by gRPC's threads, several at a time."""

    def get(self, key: ExpertKey) -> Mapping[str, Tensor]:
        """Raises NotHere."""
        ...

    def put(self, key: ExpertKey, tensors: Mapping[str, Tensor], version: int) -> None:
        """Raises NotHere when the model is unknown, CallError when the tensors do not fit it."""
        ...


def put_weights(
    address: str,
    key: ExpertKey,
    tensors: Mapping[str, Tensor],
    *,
    version: int = 1,
    timeout_s: float,
) -> None:
    """Give an expert to the host at ``address``; the host serves it when this returns.

    Raises what the host's store raises, Expired, and HostLost when the host is gone.
    """
    named = WeightsKey(model=key.model, layer=key.layer, expert=key.expert, version=version)
    chunks = _split(named, _save(tensors))
    with _stub(address) as stub:
        # As a future: the plain call would wait, beyond its deadline, for a chunk that is stuck.
        stub.Put.future(chunks, timeout=timeout_s).result()


def get_weights(
    address: str, key: ExpertKey, *, timeout_s: float, max_bytes: int = MAX_WEIGHTS_BYTES
) -> dict[str, Tensor]:
    """Copy an expert from the host at ``address``.

    Raises NotHere when the host lacks it, CallError when what arrives is larger than ``max_bytes``
    or damaged, Expired, and HostLost when the host is gone.
    """
    wanted = WeightsKey(model=key.model, layer=key.layer, expert=key.expert)
    with _stub(address) as stub:
        _, data = _join(stub.Get(wanted, timeout=timeout_s), max_bytes)
    return _load(data)


@contextlib.contextmanager
def _stub(address: str) -> Iterator[WeightsStub]:
    """A connection of its own: weights never stand before a token."""
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    try:
        yield WeightsStub(channel)
    except grpc.RpcError as error:
        raise from_grpc(error, address) from error
    finally:
        close_channel(channel, CLOSE_S)


def add_weights(
    server: grpc.Server, store: WeightsStore, max_bytes: int = MAX_WEIGHTS_BYTES
) -> None:
    """Let ``server`` answer for ``store``."""
    add_WeightsServicer_to_server(_Servicer(store, max_bytes), server)


class _Servicer(WeightsServicer):
    def __init__(self, store: WeightsStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    def Put(  # noqa: N802
        self, request_iterator: Iterator[WeightsChunk], context: grpc.ServicerContext
    ) -> PutWeightsResult:
        with aborting(context):
            head, data = _join(request_iterator, self._max_bytes)
            key = ExpertKey(head.model, head.layer, head.expert)
            self._store.put(key, _load(data), head.version)
            return PutWeightsResult(bytes=len(data))

    def Get(  # noqa: N802
        self, request: WeightsKey, context: grpc.ServicerContext
    ) -> Iterator[WeightsChunk]:
        with aborting(context):
            key = ExpertKey(request.model, request.layer, request.expert)
            data = _save(self._store.get(key))
        yield from _split(request, data)


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CallError(f"weights: not a safetensors file: {error}") from error


def _split(key: WeightsKey, data: bytes) -> Iterator[WeightsChunk]:
    yield WeightsChunk(
        key=key, total_bytes=len(data), crc32=zlib.crc32(data), data=data[:CHUNK_BYTES]
    )
    for start in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
        yield WeightsChunk(data=data[start : start + CHUNK_BYTES])


def _join(chunks: Iterator[WeightsChunk], max_bytes: int) -> tuple[WeightsKey, bytes]:
    """The key and the bytes of a whole file. Raises CallError when they are not as announced."""
    head = next(chunks, None)
    if head is None or not head.HasField("key"):
        raise CallError("key: the first chunk of weights does not name an expert")
    total = head.total_bytes
    if total > max_bytes:
        raise CallError(f"total_bytes: {total} of weights, at most {max_bytes} are taken")
    parts, size, crc32 = [], 0, 0
    chunk: WeightsChunk | None = head
    while chunk is not None:
        parts.append(chunk.data)
        size += len(chunk.data)
        if size > total:
            raise CallError(f"total_bytes: {total} of weights announced, {size} arrived so far")
        crc32 = zlib.crc32(chunk.data, crc32)
        chunk = next(chunks, None)
    if size < total:
        raise CallError(f"total_bytes: {total} of weights announced, {size} arrived")
    if crc32 != head.crc32:
        raise CallError(f"crc32: weights have {crc32:#x}, {head.crc32:#x} was announced")
    return head.key, b"".join(parts)
