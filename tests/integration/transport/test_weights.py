"""Weights between processes: what is put is what is got, and anything else is refused by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from moesaic.actors.transport.grpc import weights
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.actors.transport.grpc.stream import GrpcListener
from moesaic.actors.transport.grpc.weights import get_weights, put_weights
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.proto.errors import (
    CallError,
    ClusterError,
    Corrupted,
    Expired,
    HostLost,
    InternalError,
    MoesaicError,
    NotHere,
)
from moesaic.proto.expert_pb2 import WeightsChunk, WeightsKey
from moesaic.proto.expert_pb2_grpc import WeightsStub
from tests.helpers.pool.transports import (
    DEADLINE_S,
    DictStore,
    member,
    open_things,
    process,
    settles,
)
from tests.helpers.processes.frozen import freeze

KEY = ExpertKey("model", 3, 5)
ONE = ExpertVersion(KEY, 1)
MIB = 1 << 20
MOST = 256 * MIB


@pytest.fixture
def store() -> DictStore:
    return DictStore()


@pytest.fixture
def address(store: DictStore) -> Iterator[str]:
    listener = GrpcListener(weights=store)
    yield listener.address
    listener.close()


def expert(hidden: int = 64) -> dict[str, Tensor]:
    up = torch.randn(2 * hidden, hidden, dtype=torch.bfloat16)
    return {"up": up, "down": torch.randn(hidden, hidden), "up_bias": torch.randn(hidden).half()}


def same(given: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> bool:
    return given.keys() == got.keys() and all(
        torch.equal(given[name], got[name]) and given[name].dtype == got[name].dtype
        for name in given
    )


@pytest.mark.parametrize("hidden", [8, 1024])
def test_put_and_get(address: str, store: DictStore, hidden: int) -> None:
    tensors = expert(hidden)
    ninth = ExpertVersion(KEY, 9)
    put_weights(address, ninth, tensors, timeout_s=DEADLINE_S)
    assert same(tensors, store.held[ninth])
    assert same(tensors, get_weights(address, ninth, timeout_s=DEADLINE_S, max_bytes=MOST))


def test_views_travel_as_what_they_show(address: str, store: DictStore) -> None:
    stacked = torch.randn(4, 6, 8)
    views = {"up": stacked[1].t(), "down": stacked[2], "up_bias": stacked[3, :, 0]}
    put_weights(address, ONE, views, timeout_s=DEADLINE_S)
    assert same(views, store.held[ONE])


def test_what_was_got_can_be_written_to(address: str, store: DictStore) -> None:
    store.held[ONE] = expert()
    got = get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    got["up"].zero_()


def test_unknown(address: str) -> None:
    with pytest.raises(NotHere, match=r"expert 5 of layer 3 of model"):
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    with pytest.raises(NotHere, match="'other' is unknown"):
        put_weights(
            address, ExpertVersion(KEY._replace(model="other"), 1), expert(), timeout_s=DEADLINE_S
        )


def test_larger_than_wanted(address: str, store: DictStore) -> None:
    store.held[ONE] = expert()
    with pytest.raises(CallError, match="total_bytes"):
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=100)


def test_larger_than_a_host_takes(address: str) -> None:
    error = put_error(address, chunks_of(expert(), total_bytes=1 << 40))
    assert isinstance(error, CallError)
    assert "total_bytes" in str(error)


def test_a_defect_of_the_host(address: str, store: DictStore) -> None:
    def fail() -> None:
        raise KeyError("a defect")

    store.on_get = fail
    with pytest.raises(InternalError, match=r"KeyError.*a defect"):
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    store.on_get = lambda: None
    with pytest.raises(NotHere):
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)


def test_too_slow(address: str, store: DictStore) -> None:
    asked = threading.Event()
    store.on_get = lambda: asked.wait(DEADLINE_S)
    with pytest.raises(Expired):
        get_weights(address, ONE, timeout_s=0.1, max_bytes=MOST)
    asked.set()


def test_a_host_that_freezes_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    with process("host", "grpc") as (child, address):
        real = weights._split

        def freezing(key: WeightsKey, data: np.ndarray) -> Iterator[WeightsChunk]:
            for number, chunk in enumerate(real(key, data)):
                if number == 2:
                    freeze(child.pid)
                yield chunk

        monkeypatch.setattr(weights, "_split", freezing)
        large = {"up": torch.zeros(64 * MIB, dtype=torch.uint8)}
        start = time.monotonic()
        with pytest.raises(Expired):
            put_weights(address, ONE, large, timeout_s=1.0)
        assert time.monotonic() - start < 5.0


def test_nobody_there() -> None:
    listener = GrpcListener(weights=DictStore())
    listener.close()
    with pytest.raises(HostLost):
        get_weights(listener.address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    with pytest.raises(HostLost):
        put_weights(listener.address, ONE, expert(), timeout_s=DEADLINE_S)


def test_a_host_without_weights() -> None:
    listener = GrpcListener()
    with pytest.raises(ClusterError):
        get_weights(listener.address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    listener.close()


def test_nothing_is_left(address: str, store: DictStore) -> None:
    store.held[ONE] = expert()
    get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    before = open_things()
    for _ in range(5):
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
        put_weights(address, ONE, expert(), timeout_s=DEADLINE_S)
    assert settles(lambda: all(a <= b for a, b in zip(open_things(), before, strict=True)))


# ---- peers that do not keep to the wire ---------------------------------------------------------


def chunks_of(tensors: Mapping[str, Tensor], **head: int) -> list[WeightsChunk]:
    """The chunks of a file, with some of its head's numbers changed."""
    data = safetensors.torch.save(dict(tensors))
    fields = {"total_bytes": len(data), "checksum": xxhash.xxh3_64_intdigest(data)} | head
    key = WeightsKey(model=KEY.model, layer=KEY.layer, expert=KEY.expert, version=1)
    return [
        WeightsChunk(key=key, data=data[:100], **fields),
        *[WeightsChunk(data=data[i : i + 100]) for i in range(100, len(data), 100)],
    ]


def put_error(address: str, chunks: list[WeightsChunk]) -> MoesaicError:
    with member(address, "weights") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            WeightsStub(channel).Put.future(iter(chunks), timeout=DEADLINE_S).result()
        return from_grpc(caught.value, "host")


def test_damaged_files(address: str, store: DictStore) -> None:
    good = chunks_of(expert(8))
    headless = [WeightsChunk(data=chunk.data) for chunk in good]
    rubbish = b"\xff" * 64
    not_safetensors = WeightsChunk(
        key=good[0].key, total_bytes=64, checksum=xxhash.xxh3_64_intdigest(rubbish), data=rubbish
    )
    size = good[0].total_bytes
    for chunks, kind, reason in (
        ([], CallError, "key"),
        (headless, CallError, "key"),
        (good[:-1], CallError, "total_bytes"),
        ([*good, good[-1]], CallError, "total_bytes"),
        (chunks_of(expert(8), total_bytes=size + 1), CallError, "total_bytes"),
        (chunks_of(expert(8), checksum=1), Corrupted, "checksum"),
        ([not_safetensors], CallError, "safetensors"),
    ):
        error = put_error(address, chunks)
        assert isinstance(error, kind), error
        assert reason in str(error)
    assert not store.held


def test_a_damaged_answer(store: DictStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.held[ONE] = expert()
    listener = GrpcListener(weights=store)
    real = weights._split

    def flipped(key: WeightsKey, data: np.ndarray) -> Iterator[WeightsChunk]:
        for chunk in real(key, data):
            chunk.data = chunk.data[:-1] + bytes([chunk.data[-1] ^ 1])
            yield chunk

    def cut(key: WeightsKey, data: np.ndarray) -> Iterator[WeightsChunk]:
        (chunk,) = real(key, data)
        chunk.data = chunk.data[:-1]
        yield chunk

    for broken, kind, reason in (
        (flipped, Corrupted, "checksum"),
        (cut, CallError, "total_bytes"),
    ):
        monkeypatch.setattr(weights, "_split", broken)
        with pytest.raises(kind, match=reason):
            get_weights(listener.address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST)
    listener.close()
