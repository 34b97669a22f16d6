"""The router against real hosts in this process: refusals, losses, moves, and several routers.

Hosts are threads; where a test needs calls to meet in a host, it holds the host's loop.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host import host_loop
from moesaic.actors.host.host import ExpertHost
from moesaic.actors.router.router import Router
from moesaic.cluster.host.emulation import Emulation
from moesaic.cluster.host.residency import HostPolicy
from moesaic.cluster.placement import (
    ExpertKey,
    LayerKey,
    LayerPlacement,
    Placement,
    PlacementId,
    Replica,
)
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.proto.errors import CallError, ClusterError, ExpertUnavailable, MoesaicError
from tests.helpers.served_pool import held
from tests.helpers.serving import (
    EXPERTS,
    HASTY,
    HIDDEN,
    KEY,
    KINDS,
    LAYER,
    Hosts,
    assert_right,
    inputs,
    save_model,
    sent,
    serving,
)
from tests.helpers.transports import open_things, settles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@contextmanager
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def used(ids_TK: Tensor, held_by: set[int]) -> list[int]:
    """Rows that use one of these experts."""
    return [row for row, ids in enumerate(ids_TK.tolist()) if held_by & set(ids)]


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
    with serving(folder, policy=HostPolicy(max_rows=8, max_batch_rows=8)) as pool:
        router = pool.router()
        x, ids, weights = inputs(100)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert pool.refused() == 0
        assert sum(host.report().loop.calls for host in pool.hosts) >= 100 // 8


def test_shapes_that_do_not_belong_together_are_refused(folder: Path) -> None:
    with serving(folder) as pool:
        router = pool.router()
        x, ids, weights = inputs(4)
        for bad, words in (
            ((x, ids[:3], weights), "ids"),
            ((x, ids, weights[:, :1]), "weights"),
            ((x[0], ids, weights), "hidden states"),
            ((x[:, :-1], ids, weights), "hidden: 31"),
            ((x.double(), ids, weights), "dtype: hidden states are torch.float64"),
            ((x.half(), ids, weights), "dtype: float16"),
        ):
            with pytest.raises(CallError, match=words):
                router.forward(KEY, *bad)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", KINDS)
def test_not_here_is_rerouted_inside_the_call(folder: Path, transport: TransportChoice) -> None:
    asked: list[None] = []
    with serving(folder, replicas=2) as pool:
        router = pool.router(transport=transport, refresh=lambda: asked.append(None))
        pool.hosts[0].release([ExpertKey("m", LAYER, expert) for expert in range(EXPERTS)])
        for seed in range(4):
            x, ids, weights = inputs(6, seed=seed)
            assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert pool.hosts[0].report().loop.refused > 0
        assert router.stats().retries > 0
        assert router.stats().ejections == 0
        assert asked, "nobody asked for a newer placement"


def test_busy_is_sent_again(folder: Path) -> None:
    policy = HostPolicy(max_rows=4, max_batch_rows=4, max_queue_rows=4)
    with serving(folder, hosts=1, policy=policy) as pool, in_background() as start:
        router = pool.router()
        x, ids, weights = inputs(24)
        with held(pool.hosts[0]):
            call = start(router.forward, KEY, x, ids, weights)
            assert settles(lambda: sent(router) > 1)
        assert_right(call.result(30), pool.answer(x, ids, weights))
        assert pool.refused() > 0
        assert router.stats().retries > 0


def test_a_defect_of_one_host_costs_its_own_rows_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host's answers are on their way when the first one fails."""
    with serving(folder) as pool, in_background() as start:
        broken, sound = pool.hosts
        router = pool.router()
        lost: list[tuple[list[int], MoesaicError]] = []
        router.batch.on_lost = lambda rows, error: lost.append((rows, error))
        x, ids, weights = inputs(16)
        real = host_loop.compute

        def fail(store: Any, *args: Any, **kwargs: Any) -> Any:
            if store is broken._store:
                raise IndexError("drill")
            return real(store, *args, **kwargs)

        monkeypatch.setattr(host_loop, "compute", fail)
        with held(sound):
            call = start(router.forward, KEY, x, ids, weights)
            assert settles(lambda: broken.report().loop.refused > 0)
            assert settles(lambda: sent(router) == 1)
        out = call.result(30)
        rows, error = lost[0]
        theirs = {e for e in range(EXPERTS) if pool.holders(e) == [broken]}
        assert rows == used(ids, theirs)
        assert 0 < len(rows) < 16
        assert "IndexError: drill" in str(error)
        assert error.code == "InternalError"
        expected = pool.answer(x, ids, weights)
        expected[rows] = 0.0
        assert_right(out, expected)
        monkeypatch.undo()
        router.begin_step()
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", KINDS)
def test_a_host_that_closes_in_the_middle_is_replaced(
    folder: Path, transport: TransportChoice
) -> None:
    with serving(folder, replicas=2) as pool, in_background() as start:
        router = pool.router(transport=transport)
        x, ids, weights = inputs(64)
        with held(pool.hosts[0]) as go_on:
            call = start(router.forward, KEY, x, ids, weights)
            assert settles(lambda: pool.hosts[1].report().loop.calls == 1)
            assert settles(lambda: sent(router) == 1), "the other host's answer is in"
            closing = start(pool.hosts[0].close)
            assert settles(lambda: pool.hosts[0]._loop._stopping)
            go_on()
            assert_right(call.result(30), pool.answer(x, ids, weights))
            closing.result(30)
        assert router.stats().retries == 1
        assert router.stats().hosts["host-0"] != "up"
        x, ids, weights = inputs(64, seed=1)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


@pytest.mark.parametrize("transport", KINDS)
def test_a_host_that_freezes_is_ejected_and_taken_back(
    folder: Path, transport: TransportChoice
) -> None:
    policy = RouterPolicy(deadline_s=30.0, attempt_s=0.1, probe_s=0.01)
    with serving(folder, replicas=2) as pool:
        router = pool.router(policy=policy, transport=transport)
        x, ids, weights = inputs(64)
        expected = pool.answer(x, ids, weights)
        with held(pool.hosts[0]):
            for _ in range(10):
                assert_right(router.forward(KEY, x, ids, weights), expected)
            assert router.stats().ejections == 1
            assert router.stats().hosts["host-0"] == "ejected"
        router.wait_ready(10.0)
        before = pool.hosts[0].report().loop.rows
        for _ in range(4):
            assert_right(router.forward(KEY, x, ids, weights), expected)
        assert pool.hosts[0].report().loop.rows > before
        assert router.stats().ejections == 1


def test_a_single_replica_that_is_lost_is_named_within_the_deadline(folder: Path) -> None:
    with serving(folder) as pool:
        router = pool.router(policy=HASTY)
        theirs = {e for e in range(EXPERTS) if pool.holders(e) == [pool.hosts[0]]}
        pool.hosts[0].close()
        assert len(theirs) == EXPERTS // 2
        x = torch.randn(1, HIDDEN)
        for expert in (2, 3):
            ids, weights = torch.tensor([[expert]]), torch.ones(1, 1)
            start = time.monotonic()
            if expert in theirs:
                with pytest.raises(ExpertUnavailable) as raised:
                    router.forward(KEY, x, ids, weights)
                assert f"expert {expert} of layer {LAYER} of m: " in str(raised.value)
                assert "answered within 1 s" in str(raised.value)
                assert 0.9 < time.monotonic() - start < 10.0
            else:
                assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


def test_lost_rows_are_reported_and_skipped_until_the_next_step(folder: Path) -> None:
    with serving(folder) as pool:
        router = pool.router(policy=HASTY)
        lost: list[tuple[list[int], MoesaicError]] = []
        router.batch.on_lost = lambda rows, error: lost.append((rows, error))
        theirs = {e for e in range(EXPERTS) if pool.holders(e) == [pool.hosts[0]]}
        pool.hosts[0].close()
        x, ids, weights = inputs(10)
        ids[4:] = torch.tensor(sorted(set(range(EXPERTS)) - theirs))[:2]
        rows = used(ids, theirs)
        assert 0 < len(rows) <= 4
        out = router.forward(KEY, x, ids, weights)
        expected = pool.answer(x, ids, weights)
        expected[rows] = 0.0
        assert_right(out, expected)
        ((reported, error),) = lost
        assert reported == rows
        assert isinstance(error, ExpertUnavailable)
        assert "of layer 1 of m" in str(error)
        # A later layer of the same step: the rows are not asked for again, nobody waits.
        before, start = pool.hosts[1].report().loop.rows, time.monotonic()
        again = router.forward(KEY, x, ids, weights)
        assert time.monotonic() - start < HASTY.deadline_s
        assert len(lost) == 1
        assert_right(again, expected)
        assert pool.hosts[1].report().loop.rows - before == 10 - len(rows)
        # A later layer that has fewer rows (only the last ones of a prefill, say).
        fewer = router.forward(KEY, x[:2], ids[:2], weights[:2])
        assert_right(fewer, expected[:2])
        router.begin_step()
        good = ids.clone()
        good[:] = ids[9]
        assert_right(router.forward(KEY, x, good, weights), pool.answer(x, good, weights))
        assert router.stats().rows_lost == len(rows)


def test_an_expert_that_is_not_finite_costs_the_rows_that_it_touched(folder: Path) -> None:
    for exact in (False, True):
        with serving(folder, hosts=3, exact=exact) as pool:
            router = pool.router()
            lost: list[tuple[list[int], MoesaicError]] = []
            router.batch.on_lost = lambda rows, error, lost=lost: lost.append((rows, error))
            (host,) = pool.holders(5)
            tensors = host._store.get(KEY.expert(5))
            tensors["down"] = torch.full_like(tensors["down"], torch.nan)
            host._store.put(KEY.expert(5), tensors)
            x, ids, weights = inputs(20)
            rows = used(ids, {5})
            out = router.forward(KEY, x, ids, weights)
            expected = pool.answer(x, ids, weights)
            expected[rows] = 0.0
            assert_right(out, expected)
            ((reported, error),) = lost
            assert (reported, error.code) == (rows, "BadExpert")
            assert str(error) == "expert 5 of layer 1 of m: output is not finite"


# ---- placements ---------------------------------------------------------------------------------


def test_a_call_waits_for_its_first_placement(folder: Path) -> None:
    with serving(folder) as pool, in_background() as start:
        router = pool.router(placed=False)
        x, ids, weights = inputs(6)
        ids[2, 0], ids[3, 0] = EXPERTS, -1
        call = start(router.forward, KEY, x, ids, weights)
        assert settles(lambda: router.stats().calls == 1)
        router.place(pool.placement)
        assert_right(call.result(30), pool.answer(x, ids, weights))


def test_an_unknown_layer_or_model_is_named(folder: Path) -> None:
    with serving(folder) as pool:
        hasty, router = pool.router(policy=HASTY), pool.router()
        x, ids, weights = inputs(2)
        for key in (LayerKey("m", 9), LayerKey("../../etc/passwd", LAYER)):
            with pytest.raises(ExpertUnavailable, match=f"of layer {key.layer} of {key.model}"):
                hasty.forward(key, x, ids, weights)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


def test_experts_move_between_hosts_in_the_middle_of_traffic(folder: Path) -> None:
    """An expert is evicted as soon as the newer placement is published, not before."""
    with serving(folder, hosts=3) as pool, in_background() as start:
        router = pool.router()
        over = threading.Event()

        def move_around() -> int:
            at = {expert: pool.holders(expert)[0] for expert in range(EXPERTS)}
            moves = 0
            while not over.is_set():
                key = ExpertKey("m", LAYER, moves % EXPERTS)
                old = at[key.expert]
                new = pool.hosts[(pool.hosts.index(old) + 1 + moves % 2) % 3]
                new.load([(pool.ref, pool.shape)], [key])
                at[key.expert] = new
                replicas = tuple((Replica(at[e].name, 1.0),) for e in range(EXPERTS))
                moves += 1
                router.place(
                    Placement(
                        PlacementId(1, 1 + moves),
                        pool.placement.hosts,
                        {**pool.placement.layers, KEY: LayerPlacement(replicas)},
                    )
                )
                old.release([key])
            return moves

        moving = start(move_around)
        try:
            for seed in range(200):
                x, ids, weights = inputs(1 + seed % 40, 1 + seed % 4, seed=seed)
                assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        finally:
            over.set()
        moves = moving.result(30)
        assert moves > 20
        assert router.stats().placement == PlacementId(1, 1 + moves)
        assert router.stats().rows_lost == 0


def test_a_restarted_host_is_reached_under_its_new_incarnation(folder: Path) -> None:
    with serving(folder) as pool, in_background() as start:
        router = pool.router()
        x, ids, weights = inputs(16)
        pool.hosts[0].close()
        call = start(router.forward, KEY, x, ids, weights)
        assert settles(lambda: router.stats().hosts["host-0"] != "up")
        again = ExpertHost("host-0", node="here", device="cpu")
        pool.stack.callback(again.close)
        keys = [
            ExpertKey("m", layer.layer, expert)
            for layer in pool.layers
            for expert in range(EXPERTS)
        ]
        again.load([(pool.ref, pool.shape)], keys)
        entries = {**pool.placement.hosts, "host-0": again.entry()}
        assert not call.done()
        router.place(Placement(PlacementId(1, 2), entries, pool.placement.layers))
        assert_right(call.result(30), pool.answer(x, ids, weights))


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
        pool.hosts[0].release(key)
        x, ids, weights = inputs(32)
        with pytest.raises(KeyboardInterrupt):
            router.forward(KEY, x, ids, weights)
        pool.hosts[0].load([(pool.ref, pool.shape)], key)
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
        with pytest.raises(ClusterError, match=r"lonely: not ready after 0.1 s.* 1 of 1 layers"):
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
