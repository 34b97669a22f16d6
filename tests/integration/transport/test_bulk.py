"""A training run's tensors between processes: over shared memory on one node, else over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.actors.transport.bulk import links as bulk_links
from moesaic.actors.transport.bulk import server as bulk_server
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.grpc import weights
from moesaic.actors.transport.grpc.stream import GrpcListener
from moesaic.actors.transport.grpc.weights import get_weights
from moesaic.cluster.expert_keys import SHARED, ExpertKey, ExpertVersion, trunk_block
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import BulkKey
from moesaic.proto.errors import (
    Busy,
    CallError,
    ClusterError,
    Expired,
    HostLost,
    InternalError,
    MoesaicError,
    NotHere,
    Unauthenticated,
)
from moesaic.proto.keys import ClusterSecret
from tests.helpers.pool.bulk import (
    MIB,
    NODE,
    ONE,
    BulkHost,
    bulk_host,
    shared_memories,
)
from tests.helpers.pool.transports import DEADLINE_S, SECRET, DictStore, open_things, settles

EXPERT = ExpertKey("model", 3, 5)
KEYS: dict[str, BulkKey] = {
    "weights": BulkKey("weights", EXPERT, version=1 << 40),
    "weights that a run puts": BulkKey("weights", EXPERT, version=7, run=1 << 50),
    "a gradient of a host": BulkKey(
        "gradient", EXPERT, attempt=Attempt(1 << 50, 12, 3), source="host-1"
    ),
    "a gradient of a trunk": BulkKey(
        "gradient", trunk_block("model", 4), attempt=Attempt(1, 0, 0), source="worker 0/ä"
    ),
    "state": BulkKey("state", ExpertKey("model", 0, SHARED), run=9),
}
TENSORS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "dtypes": {
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp32": torch.randn(7),
        "fp64": torch.randn(2, 2, 2, dtype=torch.float64),
        "int64": torch.arange(3),
    },
    "no elements and scalars": {"empty": torch.empty(0, 4), "step": torch.tensor(3.0)},
    "views": {"t": torch.randn(40, 60).t(), "row": torch.randn(3, 5)[:, 1]},
    "several pieces": {"up": torch.randn(5_000_000), "down": torch.randn(1111, 1111)},
}


@pytest.fixture
def host() -> Iterator[BulkHost]:
    with bulk_host() as one:
        yield one


@pytest.fixture(params=["shared memory", "gRPC"])
def links(request: pytest.FixtureRequest) -> Iterator[BulkLinks]:
    one = BulkLinks(NODE if request.param == "shared memory" else "elsewhere", SECRET)
    yield one
    one.close()


@pytest.fixture
def near() -> Iterator[BulkLinks]:
    one = BulkLinks(NODE, SECRET)
    yield one
    one.close()


def same(given: dict[str, Tensor], got: dict[str, Tensor]) -> bool:
    return given.keys() == got.keys() and all(
        torch.equal(given[name], got[name])
        and given[name].dtype == got[name].dtype
        and given[name].shape == got[name].shape
        for name in given
    )


def got(
    links: BulkLinks, host: BulkHost | HostEntry, key: BulkKey = ONE, timeout_s: float = DEADLINE_S
) -> int:
    """The number of tensors that a get brings."""
    entry = host.entry if isinstance(host, BulkHost) else host
    with links.get(entry, key, timeout_s=timeout_s) as tensors:
        return len(tensors)


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("which", KEYS)
def test_what_is_put_is_what_is_got(
    host: BulkHost, links: BulkLinks, which: str, kind: str
) -> None:
    key, given = KEYS[which], TENSORS[kind]
    links.put(host.entry, key, given, timeout_s=DEADLINE_S)
    assert list(host.store.held) == [key]
    assert same(given, host.store.held[key])
    with links.get(host.entry, key, timeout_s=DEADLINE_S) as tensors:
        assert same(given, tensors)
    assert settles(lambda: host.held_bytes() == host.store.readers == 0)


def test_the_host_has_a_copy_of_its_own(host: BulkHost, links: BulkLinks) -> None:
    first, second = {"a": torch.zeros(1000)}, {"a": torch.ones(1000)}
    links.put(host.entry, ONE, first, timeout_s=DEADLINE_S)
    links.put(host.entry, ONE._replace(version=2), second, timeout_s=DEADLINE_S)
    assert same(host.store.held[ONE], {"a": torch.zeros(1000)})
    first["a"].fill_(2)
    host.store.held[ONE]["a"].fill_(3)
    with links.get(host.entry, ONE, timeout_s=DEADLINE_S) as tensors:
        tensors["a"].fill_(4)
    assert same(host.store.held[ONE], {"a": torch.full((1000,), 3.0)})


def test_what_is_got_lies_in_memory_that_is_used_again(host: BulkHost, near: BulkLinks) -> None:
    host.store.held[ONE] = {"a": torch.ones(1000)}
    places = set()
    for _ in range(3):
        with near.get(host.entry, ONE, timeout_s=DEADLINE_S) as tensors:
            places.add(tensors["a"].data_ptr())
    assert len(places) == 1
    assert len(host.server._serving) == 1


def test_memory_grows(host: BulkHost, near: BulkLinks) -> None:
    for size in (10, 10 * MIB, 1000, 11 * MIB):
        given = {"a": torch.arange(size).to(torch.uint8)}
        host.store.held[ONE] = given
        with near.get(host.entry, ONE, timeout_s=DEADLINE_S) as tensors:
            assert same(given, tensors)
        near.put(host.entry, ONE._replace(version=size), given, timeout_s=DEADLINE_S)
    assert len(host.server._serving) == 1
    assert shared_memories() == 2, "the client's mapping and the host's, both in this process"


def test_several_at_once(host: BulkHost, links: BulkLinks) -> None:
    """Also more than a host serves at a time over gRPC."""

    def there_and_back(number: int) -> None:
        key = ONE._replace(version=number)
        given = {"a": torch.full((100_000,), float(number)), "b": torch.tensor(number)}
        links.put(host.entry, key, given, timeout_s=DEADLINE_S)
        for _ in range(5):
            with links.get(host.entry, key, timeout_s=DEADLINE_S) as tensors:
                assert same(given, tensors)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(there_and_back, range(24)))
    assert settles(lambda: host.held_bytes() == host.store.readers == 0)


def test_a_get_inside_of_another(host: BulkHost, near: BulkLinks) -> None:
    two = ONE._replace(version=2)
    host.store.held = {ONE: {"a": torch.ones(10)}, two: {"a": torch.zeros(10)}}
    with (
        near.get(host.entry, ONE, timeout_s=DEADLINE_S) as first,
        near.get(host.entry, two, timeout_s=DEADLINE_S) as second,
    ):
        assert (first["a"] == 1).all()
        assert (second["a"] == 0).all()


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NotHere, CallError, Busy, Expired, HostLost])
def test_the_stores_errors_arrive(
    host: BulkHost,
    links: BulkLinks,
    kind: type[MoesaicError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_PAUSE_S", DEADLINE_S)  # no second try

    def fail(_: BulkKey) -> None:
        raise kind("the store says why")

    host.store.on_read = host.store.on_put = fail
    for transfer in (
        lambda: got(links, host),
        lambda: links.put(host.entry, ONE, TENSORS["several pieces"], timeout_s=DEADLINE_S),
    ):
        with pytest.raises(kind, match=r"host: .*the store says why|127.*the store says why"):
            transfer()
    host.store.on_read = host.store.on_put = lambda _: None
    links.put(host.entry, ONE, TENSORS["dtypes"], timeout_s=DEADLINE_S)
    assert got(links, host) == 4
    assert settles(lambda: host.held_bytes() == host.store.readers == 0)


def test_a_store_that_is_busy_for_a_moment(host: BulkHost, links: BulkLinks) -> None:
    host.store.held[ONE] = TENSORS["dtypes"]
    asked = []

    def first_busy(_: BulkKey) -> None:
        asked.append(1)
        if len(asked) == 1:
            raise Busy("not yet")

    host.store.on_read = first_busy
    assert got(links, host) == 4
    assert len(asked) > 1


def test_a_defect_of_the_store(host: BulkHost, links: BulkLinks) -> None:
    def fail(_: BulkKey) -> None:
        raise KeyError("a defect")

    host.store.on_read = fail
    with pytest.raises(InternalError, match=r"KeyError.*a defect"):
        got(links, host)


def test_what_the_host_does_not_know_or_want(host: BulkHost, links: BulkLinks) -> None:
    given, large = TENSORS["dtypes"], {"a": torch.zeros(20 * MIB, dtype=torch.uint8)}
    with pytest.raises(NotHere, match="is not on this host"):
        got(links, host)
    with pytest.raises(NotHere, match="'other' is unknown"):
        other = ONE._replace(key=EXPERT._replace(model="other"))
        links.put(host.entry, other, given, timeout_s=DEADLINE_S)
    host.store.most = 1 * MIB
    with pytest.raises(CallError, match=r"total_bytes: 2.* at most 1048576"):
        links.put(host.entry, ONE, large, timeout_s=DEADLINE_S)
    with pytest.raises(CallError, match="z: "):
        links.put(
            host.entry, ONE, {"z": torch.zeros(1, dtype=torch.complex128)}, timeout_s=DEADLINE_S
        )
    assert not host.store.held
    links.put(host.entry, ONE, given, timeout_s=DEADLINE_S)
    assert same(given, host.store.held[ONE])


def test_more_bytes_than_one_transfer_may_have(
    host: BulkHost, near: BulkLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.store.held[ONE] = {"a": torch.zeros(2 * MIB, dtype=torch.uint8)}
    monkeypatch.setattr(bulk_server, "MAX_BULK_BYTES", 1 * MIB)
    with pytest.raises(CallError, match="more than the 1048576 of one transfer"):
        got(near, host)


def test_a_wrong_proof(host: BulkHost, links: BulkLinks) -> None:
    host.store.held[ONE] = TENSORS["dtypes"]
    stranger = BulkLinks(links._node, ClusterSecret.new())
    again = replace(host.entry, incarnation=2)
    for one, entry in ((stranger, host.entry), (links, again)):
        with pytest.raises(Unauthenticated, match="proof"):
            one.put(entry, KEYS["state"], TENSORS["dtypes"], timeout_s=DEADLINE_S)
        with pytest.raises(Unauthenticated, match="proof"):
            got(one, entry)
    assert list(host.store.held) == [ONE]
    stranger.close()
    assert settles(lambda: not host.server._serving)


def test_a_deadline(host: BulkHost, links: BulkLinks) -> None:
    host.store.held[ONE] = TENSORS["dtypes"]
    go_on = threading.Event()
    host.store.on_read = host.store.on_put = lambda _: go_on.wait(DEADLINE_S)
    with pytest.raises(Expired):
        got(links, host, timeout_s=0.1)
    with pytest.raises(Expired):
        links.put(host.entry, ONE, TENSORS["dtypes"], timeout_s=0.1)
    go_on.set()
    assert got(links, host) == 4
    assert settles(lambda: host.held_bytes() == host.store.readers == 0)
    assert settles(lambda: len(host.server._serving) <= 1)


def test_a_host_without_tensors_of_runs() -> None:
    listener = GrpcListener(weights=DictStore(), secret=SECRET)
    with pytest.raises(ClusterError, match="kind: this host has no tensors"):
        get_weights(
            listener.address,
            ONE,
            timeout_s=DEADLINE_S,
            max_bytes=MIB,
            proof=SECRET.proof("weights", ""),
        )
    listener.close()


def test_experts_and_tensors_of_runs_do_not_meet(host: BulkHost) -> None:
    host.store.held[ONE] = TENSORS["dtypes"]
    with pytest.raises(ClusterError, match="key: this host has no experts"):
        get_weights(
            host.entry.grpc_address,
            ExpertVersion(ONE.key, ONE.version),
            timeout_s=DEADLINE_S,
            max_bytes=MIB,
            proof=SECRET.proof("weights", host.entry.target),
        )


# ---- connections come and go --------------------------------------------------------------------


def test_close_while_in_use(host: BulkHost, near: BulkLinks) -> None:
    host.store.held[ONE] = TENSORS["dtypes"]
    with near.get(host.entry, ONE, timeout_s=DEADLINE_S) as tensors:
        near.close()
        assert same(TENSORS["dtypes"], tensors)
        with pytest.raises(HostLost):
            got(near, host)
    del tensors
    assert settles(lambda: not host.server._serving)
    assert shared_memories() == 0


def test_close_while_a_get_waits(host: BulkHost, near: BulkLinks) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def wait(_: BulkKey) -> None:
        reading.set()
        go_on.wait(DEADLINE_S)

    host.store.on_read = wait
    with ThreadPoolExecutor(1) as pool:
        getting = pool.submit(got, near, host)
        assert reading.wait(DEADLINE_S)
        near.close()
        with pytest.raises(HostLost):
            getting.result(DEADLINE_S)
        go_on.set()
    assert settles(lambda: not host.server._serving and host.store.readers == 0)


def test_tensors_outlive_their_host(near: BulkLinks) -> None:
    with bulk_host() as host:
        host.store.held[ONE] = TENSORS["dtypes"]
        with near.get(host.entry, ONE, timeout_s=DEADLINE_S) as tensors:
            host.server.close()
            assert same(TENSORS["dtypes"], tensors)
        with pytest.raises(HostLost):
            got(near, host)


def test_a_host_that_was_restarted_gets_a_new_connection(near: BulkLinks) -> None:
    with bulk_host(incarnation=1) as first:
        first.store.held[ONE] = {"a": torch.zeros(1)}
        assert got(near, first) == 1
        (old,) = near._idle
        with bulk_host(incarnation=2) as second:
            second.store.held[ONE] = {"a": torch.ones(1), "b": torch.ones(1)}
            assert got(near, second) == 2
            assert old not in near._idle
            assert settles(lambda: not first.server._serving), "the old one is closed"


def test_idle_connections_end_and_their_memory_with_them(
    host: BulkHost, near: BulkLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_server, "BULK_IDLE_S", 0.05)
    host.store.held[ONE] = TENSORS["dtypes"]
    assert got(near, host) == 4
    assert settles(lambda: not host.server._serving)
    assert shared_memories() == 1, "the client's own"
    assert got(near, host) == 4


def test_little_memory_is_kept(
    host: BulkHost, near: BulkLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_links, "MAX_KEPT_BYTES", 2 * MIB)
    host.store.held = {
        ONE._replace(version=n): {"a": torch.zeros(n * MIB - 4096, dtype=torch.uint8)}
        for n in (1, 3)
    }
    small, large = host.store.held
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(near.get(host.entry, small, timeout_s=DEADLINE_S))
    assert [link.nbytes for link in near._idle] == [MIB, MIB]
    assert settles(lambda: shared_memories() == 4)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(near.get(host.entry, small, timeout_s=DEADLINE_S))
        assert got(near, host, large) == 1
    assert [link.nbytes for link in near._idle] == [MIB, MIB]
    assert settles(lambda: len(host.server._serving) == 2)


def test_nothing_is_left(links: BulkLinks) -> None:
    with bulk_host() as warm:
        links.put(warm.entry, ONE, TENSORS["dtypes"], timeout_s=DEADLINE_S)
    before = open_things()
    for _ in range(3):
        with bulk_host() as host:
            one = BulkLinks(links._node, SECRET)
            one.put(host.entry, ONE, TENSORS["several pieces"], timeout_s=DEADLINE_S)
            assert got(one, host) == 2
            with pytest.raises(NotHere):
                got(one, host, ONE._replace(version=2))
            one.close()
    assert settles(lambda: all(a <= b for a, b in zip(open_things(), before, strict=True)))
    assert shared_memories() <= 1, "that of the fixture"
