"""Weights that a host does not want, and who may give it some; an honest router beside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from moesaic.actors.host.host import ExpertHost, local_hosts
from moesaic.actors.host.weight_grants import grant_all
from moesaic.actors.transport.grpc import stalls, weights
from moesaic.actors.transport.grpc import stream as grpc_stream
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.actors.transport.grpc.weights import get_weights, put_weights
from moesaic.actors.trunk import attach
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, first_versions
from moesaic.cluster.placement import ModelRef, ModelShape, every_expert
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.proto.errors import Busy, CallError, Forbidden, HostLost, MoesaicError, Superseded
from moesaic.proto.expert_pb2 import WeightsChunk, WeightsKey
from moesaic.proto.expert_pb2_grpc import WeightsStub
from moesaic.proto.keys import ClusterSecret, Grant, secret_of_process
from moesaic.proto.limits import CHUNK_BYTES
from tests.helpers.models.architectures import tiny_model
from tests.helpers.pool.honest import FIRST, ONE, fetched, honest
from tests.helpers.pool.pools import granted
from tests.helpers.pool.serving import EXPERTS, HIDDEN, LAYER, save_model, serving
from tests.helpers.pool.strangers import shown
from tests.helpers.pool.transports import DEADLINE_S, settles

pytestmark = pytest.mark.alone  # deadlines are kept by the clock
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def put_raw(
    host: ExpertHost,
    chunks: Iterator[WeightsChunk],
    *,
    key: ExpertKey = ONE,
    grant: Grant | None = None,
    timeout_s: float = DEADLINE_S,
) -> None:
    entry = host.entry()
    grant = grant or granted(host, key)
    metadata = (
        *shown(entry, "weights"),
        ("moesaic-term", str(grant.term)),
        ("moesaic-grant-bin", grant.proof),
    )
    with grpc.insecure_channel(entry.grpc_address) as channel:
        try:
            stub = WeightsStub(channel)
            stub.Put.future(chunks, timeout=timeout_s, metadata=metadata).result()
        except grpc.RpcError as error:
            raise from_grpc(error, "host") from error


def test_weights_that_are_too_large_are_refused_with_the_first_chunk(folder: Path) -> None:
    asked = 0

    def chunks() -> Iterator[WeightsChunk]:
        nonlocal asked
        key = WeightsKey(model="m", layer=LAYER, expert=1, version=1)
        yield WeightsChunk(key=key, total_bytes=400 * MIB, checksum=1, data=bytes(CHUNK_BYTES))
        for _ in range(400):
            asked += 1
            yield WeightsChunk(data=bytes(CHUNK_BYTES))

    with honest(folder) as one:
        rss = psutil.Process().memory_info().rss
        with pytest.raises(
            CallError, match=r"total_bytes: 419430400 .* of this key have at most 1?\d{4}$"
        ):
            put_raw(one.host, chunks())
        assert asked < 100
        assert psutil.Process().memory_info().rss - rss < 64 * MIB
        tensors = fetched(one.host, one.host._store.most_bytes(ONE))
        assert tensors["up"].shape == (96, HIDDEN)


def files(tensors: dict[str, Tensor], key: ExpertKey = ONE) -> Iterator[WeightsChunk]:
    data = safetensors.torch.save(tensors)
    named = WeightsKey(model=key.model, layer=key.layer, expert=key.expert, version=1)
    yield WeightsChunk(
        key=named, total_bytes=len(data), checksum=xxhash.xxh3_64_intdigest(data), data=data
    )


Wrong = Callable[[ExpertHost], Grant]


def of(host: ExpertHost, /, **changed: object) -> Grant:
    given = {
        "secret": secret_of_process(),
        "host": host.name,
        "incarnation": host.incarnation,
        "key": ONE,
        "version": 1,
        "term": 0,
        "shown": 0,
    } | changed
    secret = given.pop("secret")
    shown_term = given.pop("shown")
    assert isinstance(secret, ClusterSecret)
    assert isinstance(shown_term, int)
    return Grant(shown_term, secret.grant(*given.values()))  # pyright: ignore[reportArgumentType]


WRONG: dict[str, Wrong] = {
    "nothing": lambda host: Grant(0, b""),
    "another cluster's": lambda host: of(host, secret=ClusterSecret.new()),
    "another host's": lambda host: of(host, host="host-9"),
    "another incarnation's": lambda host: of(host, incarnation=host.incarnation - 1),
    "another expert's": lambda host: of(host, key=ONE._replace(expert=2)),
    "another layer's": lambda host: of(host, key=ONE._replace(layer=0)),
    "another model's": lambda host: of(host, key=ONE._replace(model="n")),
    "another version's": lambda host: of(host, version=2),
    "another term's": lambda host: of(host, term=1),
    "a proof": lambda host: Grant(0, shown(host.entry(), "weights")[0][1]),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("which", WRONG)
def test_a_grant_is_for_one_expert_on_one_host_alone(folder: Path, which: str) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        tensors = host._store.get(FIRST)
        host.release([FIRST])
        wrong = WRONG[which](host)
        with pytest.raises(Forbidden, match="the controller did not grant this"):
            put_raw(host, files(tensors), grant=wrong)
        with pytest.raises(Forbidden):
            put_raw(host, files(tensors), grant=Grant(1 << 40, wrong.proof))
        assert not host._residency.serves(FIRST)
        put_raw(host, files(tensors))
        assert host._residency.serves(FIRST)


def test_a_grant_of_a_controller_that_is_over_is_refused(folder: Path) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        tensors = host._store.get(FIRST)
        host.release([FIRST], term=4)
        host.report(term=5)
        with pytest.raises(Superseded, match="4 has ended"):
            put_raw(host, files(tensors), grant=granted(host, ONE, term=4))
        assert not host._residency.serves(FIRST)
        put_raw(host, files(tensors), grant=granted(host, ONE, term=5))
        assert host._residency.serves(FIRST)


def test_what_is_served_is_not_replaced(folder: Path) -> None:
    with honest(folder) as one:
        held = {name: tensor.clone() for name, tensor in one.host._store.get(FIRST).items()}
        put_raw(one.host, files(held))  # the same once more
        for name, tensor in held.items():
            with pytest.raises(Forbidden, match="serves other tensors under this name"):
                put_raw(one.host, files(held | {name: tensor + 1}))
            with pytest.raises(CallError, match=f"{name} has values that are not finite"):
                put_raw(one.host, files(held | {name: torch.full_like(tensor, torch.nan)}))
        assert all(torch.equal(held[n], t) for n, t in one.host._store.get(FIRST).items())


def test_transfers_that_stand_still_end_and_have_bounds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MAX_PUTS", 2)
    monkeypatch.setattr(stalls, "STILL_S", 1.0)
    with honest(folder) as one, ExitStack() as stack:
        host, over = one.host, threading.Event()
        stack.callback(over.set)
        tensors = host._store.get(FIRST)
        other = ExpertKey("m", 0, 1)
        host.release([ExpertVersion(other, 1)])
        whole = next(files(tensors, other))
        data = whole.data

        def stuck(half: bool) -> Iterator[WeightsChunk]:
            if half:
                whole.data = data[:100]
                yield whole
            over.wait(DEADLINE_S)

        errors: list[MoesaicError] = []

        def put(half: bool) -> None:
            try:
                put_raw(host, stuck(half), key=other)
            except MoesaicError as error:
                errors.append(error)

        putting = [threading.Thread(target=put, args=(half,)) for half in (True, False)]
        for each in putting:
            each.start()
        budget = servicer(host)._puts
        assert settles(lambda: budget.held == 2)
        with pytest.raises(Busy, match="transfers of weights to this host: 2 of 2 are in use"):
            put_raw(host, files(tensors, other), key=other)
        fetched(host, host._store.most_bytes(ONE))
        assert settles(lambda: budget.held == 0)
        for each in putting:
            each.join(DEADLINE_S)
        assert [type(error) for error in errors] == [HostLost, HostLost]
        assert servicer(host)._bytes.held == 0
        put_raw(host, files(tensors, other), key=other)


def test_a_put_waits_for_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        tensors = host._store.get(FIRST)
        host.release([FIRST])
        places = servicer(host)._puts
        held = places.share()
        held.take(places.most)
        threading.Timer(0.3, held.close).start()
        put_weights(
            host.entry().grpc_address,
            FIRST,
            tensors,
            timeout_s=DEADLINE_S,
            grant=granted(host, ONE),
            proof=proof_of(host),
        )
        assert host._residency.serves(FIRST)


def test_a_fetch_that_is_larger_than_its_model_says(folder: Path) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        most = host._store.most_bytes(ONE)
        address = host.entry().grpc_address
        with pytest.raises(CallError, match="total_bytes"):
            get_weights(
                address,
                FIRST,
                timeout_s=DEADLINE_S,
                max_bytes=most // 2,
                proof=proof_of(host),
            )
        get_weights(
            address,
            FIRST,
            timeout_s=DEADLINE_S,
            max_bytes=most,
            proof=proof_of(host),
        )


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_the_bound_of_a_file_is_near_its_size(folder: Path, expert: int) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        key = ExpertKey("m", LAYER, expert)
        size = len(safetensors.torch.save(host._store.get(ExpertVersion(key, 1))))
        assert size <= host._store.most_bytes(key) < size + 2048


def servicer(host: ExpertHost) -> weights.Weights:
    listener = host._loop._listeners[1]
    assert isinstance(listener, grpc_stream.GrpcListener)
    return listener._weights


def proof_of(host: ExpertHost) -> bytes:
    return secret_of_process().proof("weights", host.entry().target)


def test_attached_experts_are_put_with_the_controllers_grants() -> None:
    model = tiny_model("mixtral")
    layers = {layer.layer: layer for layer in experts_layers(model)}
    shape = ModelShape(model="memory", experts={n: la.num_experts for n, la in layers.items()})
    ref = ModelRef(name="memory", dtype="float32", config=model.config.to_dict())
    secret, keys = secret_of_process(), list(every_expert([shape]))
    with local_hosts(1) as (host,):
        host.add_models([(ref, shape)])
        granted_keys = grant_all(secret, host.entry(), first_versions(keys), term=3)
        assert granted_keys.experts == first_versions(keys)
        for _ in range(2):  # a second time nothing changes
            attach._send(granted_keys, secret, layers)
        assert {(k.model, k.layer, e) for k, es in host.report().holdings.items() for e in es} == {
            tuple(key) for key in keys
        }
        for key in keys:
            wanted = attach.expert_tensors(layers[key.layer], key.expert)
            held = host._store.get(ExpertVersion(key, 1))
            assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())
        host.report(term=4)
        with pytest.raises(Superseded):
            attach._send(granted_keys, secret, layers)
