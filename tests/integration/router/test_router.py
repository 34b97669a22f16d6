"""The router against real hosts in this process: right answers, several routers, and its own life.

Hosts are threads; where a test needs calls to meet in a host, it holds the host's loop.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import ExpertKey, first_versions
from moesaic.cluster.host.emulation import Emulation
from moesaic.cluster.host.residency import HostLimits
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.proto.errors import CallError, ClusterError
from tests.helpers.pool.served_pool import held
from tests.helpers.pool.serving import (
    EXPERTS,
    HASTY,
    HIDDEN,
    KEY,
    KINDS,
    LAYER,
    Hosts,
    assert_right,
    in_background,
    inputs,
    sent,
    serving,
)
from tests.helpers.pool.transports import open_things, settles

# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", KINDS)
@pytest.mark.parametrize("exact", [False, True])
def test_choices_that_belong_to_nobody_are_skipped(
    folder: Path, transport: TransportChoice, exact: bool
) -> None:
    with serving(folder, hosts=3, replicas=2, exact=exact) as pool:
        router = pool.router(transport=transport)
        x, ids, weights = inputs(12, 3)
        ids[::2, 1] = -1
        ids[3] = -1
        ids[5:8, 2] = EXPERTS  # transformers' own mark
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        nothing = router.forward(KEY, x, torch.full_like(ids, -1), weights)
        assert not nothing.any()
        assert router.forward(KEY, x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


def test_a_large_call_goes_in_pieces_that_hosts_take(folder: Path) -> None:
    with serving(folder, limits=HostLimits(max_rows=8, max_batch_rows=8)) as pool:
        router = pool.router()
        x, ids, weights = inputs(100)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert pool.refused() == 0
        assert sum(host.report().loop.calls for host in pool.hosts) >= 100 // 8


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_large_call_goes_as_a_whole_to_hosts_that_take_it(
    folder: Path, transport: TransportChoice
) -> None:
    limits = HostLimits(max_rows=40_000)
    with serving(folder, limits=limits) as pool:
        router = pool.router(transport=transport)
        x, ids, weights = inputs(40_000)  # tensors of 11 MB
        router.forward(KEY, x, ids, weights)
        assert [host.report().loop.batches for host in pool.hosts] == [1, 1]


def test_shapes_that_do_not_belong_together_are_refused(folder: Path) -> None:
    with serving(folder) as pool:
        router = pool.router()
        x, ids, weights = inputs(4)
        for bad, words in (
            ((x, ids[:3], weights), "ids"),
            ((x, ids, weights[:, :1]), "weights"),
            ((x[0], ids, weights), "hidden states"),
            ((x[:, :-1], ids, weights), "hidden: 31"),
            ((x.double(), ids, weights), "dtype: float64"),
            ((x.int(), ids, weights), "dtype: hidden states are torch.int32"),
            ((x.half(), ids, weights), "dtype: float16"),
        ):
            with pytest.raises(CallError, match=words):
                router.forward(KEY, *bad)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


# ---- several routers ----------------------------------------------------------------------------


@pytest.mark.parametrize("transport", KINDS)
@pytest.mark.parametrize("exact", [False, True])
def test_calls_of_several_routers_are_merged(
    folder: Path, transport: TransportChoice, exact: bool
) -> None:
    with serving(folder, hosts=1, exact=exact) as pool, in_background() as start:
        (host,) = pool.hosts
        routers = [pool.router(transport=transport) for _ in range(5)]
        # Different numbers of rows and assignments, padded to one another in the batch.
        asked = [inputs(1 + 3 * n, 1 + n % 3, seed=n) for n in range(5)]
        alone = [routers[0].forward(KEY, *one) for one in asked]
        before = host.report().loop
        with held(host):
            calls = [start(r.forward, KEY, *one) for r, one in zip(routers, asked, strict=True)]
            assert settles(lambda: all(sent(router) for router in routers))
            assert settles(lambda: _readable(host) >= 5)
        for call, one, before_alone in zip(calls, asked, alone, strict=True):
            given = call.result(30)
            assert_right(given, pool.answer(*one))
            if exact:
                assert torch.equal(given, before_alone), "the bits depend on batch mates"
        stats = host.report().loop
        assert stats.calls - before.calls == 5
        assert stats.batches - before.batches == 1


def _readable(host: ExpertHost) -> int:
    """Sessions of a host with something to hear; its loop stands still."""
    import select

    poll = select.poll()
    for fd in list(host._loop._sessions):
        poll.register(fd, select.POLLIN)
    return len(poll.poll(0))


def test_many_routers_and_many_calls(folder: Path) -> None:
    with serving(folder, hosts=2, replicas=2) as pool, in_background() as start:
        routers = [pool.router(transport=KINDS[n % 2]) for n in range(4)]

        def work(router: Router, seed: int) -> None:
            for n in range(30):
                one = inputs(1 + (seed + n) % 9, 2, seed=100 * seed + n)
                assert_right(router.forward(KEY, *one), pool.answer(*one))

        for done in [start(work, router, n) for n, router in enumerate(routers)]:
            done.result(60)


# ---- the router's own life ----------------------------------------------------------------------


def test_an_interrupted_call_leaves_the_router_usable(folder: Path) -> None:
    """Ctrl-C in a notebook comes in the middle of a call."""
    with serving(folder, replicas=2) as pool:

        def interrupt() -> None:
            raise KeyboardInterrupt

        router = pool.router(refresh=interrupt)
        key = [ExpertKey("m", LAYER, expert) for expert in range(EXPERTS)]
        pool.hosts[0].release(first_versions(key))
        x, ids, weights = inputs(32)
        with pytest.raises(KeyboardInterrupt):
            router.forward(KEY, x, ids, weights)
        pool.hosts[0].load([(pool.ref, pool.shape)], first_versions(key))
        for _ in range(3):
            assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


@pytest.mark.parametrize("transport", KINDS)
def test_closing_frees_descriptors_and_threads(folder: Path, transport: TransportChoice) -> None:
    def use(pool: Hosts) -> None:
        router = pool.router(transport=transport)
        x, ids, weights = inputs(4)
        router.forward(KEY, x, ids, weights)
        router.close()
        router.close()
        with pytest.raises(ClusterError, match="closed"):
            router.forward(KEY, x, ids, weights)

    def round_trip() -> None:
        with serving(folder) as pool:
            use(pool)  # what a host starts with its first router
            inside = open_things()
            for _ in range(3):
                use(pool)
            assert settles(lambda: open_things() <= inside), "a router leaves something behind"

    with serving(folder) as pool:
        use(pool)  # what libraries open once
    before = open_things()
    round_trip()
    assert settles(lambda: open_things() <= before), "a host leaves something behind"


def test_a_router_without_hosts_says_what_it_waits_for() -> None:
    router = Router(name="lonely", node="here", policy=HASTY)
    try:
        with pytest.raises(ClusterError, match=r"lonely was not ready within 0.1 s: 1 of 1 layers"):
            router.wait_ready(0.1, [KEY])
    finally:
        router.close()


def test_load_is_reported_while_one_slow_call_follows_the_other(folder: Path) -> None:
    """The router's lock is hardly ever free then; the controller would plan by old counts."""

    def assignments(router: Router) -> int:
        return sum(int(counts.sum()) for counts in router.take_load().counts.values())

    with serving(folder) as pool, in_background() as start:
        router, call = pool.router(), inputs(8)
        for host in pool.hosts:
            host.emulate(Emulation(call_us=80_000))
        over, ended = threading.Event(), list[int]()

        def calls() -> None:
            while not over.is_set():
                router.forward(KEY, *call)
                ended.append(call[1].numel())

        running = start(calls)
        counted = []
        for _ in range(5):
            seen = len(ended)
            assert settles(lambda seen=seen: len(ended) >= seen + 2)
            counted.append(assignments(router))
        over.set()
        running.result(10)
        assert all(counted), counted
        # What was handed over meanwhile, and what came behind it.
        counted += [assignments(router), assignments(router)]
        assert sum(counted) == sum(ended)
