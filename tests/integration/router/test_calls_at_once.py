"""Several calls of one router in progress, in one thread and in many, on real transports.

Hosts are threads of this process. Shape suffixes: T = tokens, H = hidden size, K = assignments.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.router.layer_tensors import LayerTensors
from moesaic.actors.router.router import Router
from moesaic.cluster.placement import PlacementId
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.proto.errors import ClusterError, ExpertUnavailable
from tests.helpers.pool.served_pool import held
from tests.helpers.pool.serving import (
    EXPERTS,
    KEY,
    KINDS,
    PATIENT,
    Hosts,
    assert_right,
    in_background,
    inputs,
    serving,
)
from tests.helpers.pool.transports import settles


@pytest.fixture(scope="module", params=KINDS)
def transport(request: pytest.FixtureRequest) -> TransportChoice:
    return request.param


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Hosts]:
    with serving(folder, replicas=2) as hosts:
        yield hosts


def is_free(router: Router) -> bool:
    with router._lock:
        router._waiting.until(time.monotonic() + 0.02)
    hosts = router._dispatcher.hosts.values()
    return not router._shell.running and not any(health.occupied for health in hosts)


def test_calls_are_combined_in_any_order(pool: Hosts, transport: TransportChoice) -> None:
    router = pool.router(transport=transport)
    asked = [inputs(tokens, seed=tokens) for tokens in range(1, 9)]
    calls = [router.dispatch(KEY, *given) for given in asked]
    for number in (3, 0, 7, 1, 2, 6, 5, 4):
        assert_right(calls[number].combine(), pool.answer(*asked[number]))
    assert settles(lambda: is_free(router))
    router.close()


def test_a_call_without_tokens_has_a_result(pool: Hosts, transport: TransportChoice) -> None:
    router = pool.router(transport=transport)
    x_TH, ids_TK, weights_TK = inputs(3, seed=1)
    call = router.dispatch(KEY, x_TH[:0], ids_TK[:0], weights_TK[:0])
    assert call.combine().shape == (0, x_TH.shape[1])
    router.close()


def test_more_calls_than_slots(pool: Hosts, transport: TransportChoice) -> None:
    router = pool.router(transport=transport, policy=replace(PATIENT, window=2))
    asked = [inputs(6, seed=seed) for seed in range(12)]
    calls = [router.dispatch(KEY, *given) for given in asked]
    for call, given in zip(reversed(calls), reversed(asked), strict=True):
        assert_right(call.combine(), pool.answer(*given))
    router.close()


def test_many_threads_share_a_router(pool: Hosts, transport: TransportChoice) -> None:
    router = pool.router(transport=transport)
    results: list[tuple[int, Tensor]] = []

    def work(seed: int) -> None:
        given = inputs(1 + seed % 7, seed=seed)
        results.append((seed, router.forward(KEY, *given)))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, seed) for seed in range(120)]:
            done.result(60)
    assert len(results) == 120
    for seed, result in results:
        assert_right(result, pool.answer(*inputs(1 + seed % 7, seed=seed)))
    assert settles(lambda: is_free(router))
    assert router.stats().calls == 120
    router.close()


def test_a_cancelled_call_disturbs_no_other(pool: Hosts, transport: TransportChoice) -> None:
    router = pool.router(transport=transport)
    first, second = inputs(6, seed=1), inputs(6, seed=2)
    unwanted, wanted = router.dispatch(KEY, *first), router.dispatch(KEY, *second)
    unwanted.cancel()
    assert_right(wanted.combine(), pool.answer(*second))
    assert settles(lambda: is_free(router))
    assert router.stats().hosts == dict.fromkeys(router.stats().hosts, "up")
    router.close()


@contextmanager
def standing_still(pool: Hosts) -> Iterator[None]:
    """No host does anything meanwhile."""
    with ExitStack() as stack:
        for host in pool.hosts:
            stack.enter_context(held(host))
        yield


def test_closing_a_router_ends_calls_that_wait(folder: Path) -> None:
    with serving(folder, replicas=1) as pool, in_background() as start:
        router = pool.router()
        with standing_still(pool):
            calls = [start(router.forward, KEY, *inputs(4, seed=seed)) for seed in range(3)]
            assert settles(lambda: router.stats().calls == 3)
            router.close()
            for call in calls:
                with pytest.raises(ClusterError, match="is closed"):
                    call.result(10)


def test_one_call_does_not_wait_for_another(folder: Path) -> None:
    """A report is taken, a placement followed and a call begun while another call waits."""
    with serving(folder, replicas=1) as pool, in_background() as start:
        router, given = pool.router(), inputs(4, seed=1)
        newer = replace(pool.placement, id=PlacementId(1, pool.placement.id.epoch + 1))
        with standing_still(pool):
            waiting = start(router.forward, KEY, *given)
            assert settles(lambda: router.stats().calls == 1)
            call = router.dispatch(KEY, *given)
            router.place(newer)
            report = router.take_load()
            assert report.counts[KEY].sum() == 2 * 4 * 2
            assert report.placement_id == newer.id
        for result in (call.combine(), waiting.result(30)):
            assert_right(result, pool.answer(*given))


def test_a_lost_expert_fails_its_call_alone(folder: Path) -> None:
    with serving(folder, replicas=1) as pool:
        router = pool.router(policy=replace(PATIENT, deadline_s=0.5))
        x_TH, ids_TK, weights_TK = inputs(4, seed=1)
        lost = pool.hosts[0]
        held = [e for e in range(EXPERTS) if pool.placement.layers[KEY].hosts(e) == (lost.name,)]
        others = [e for e in range(EXPERTS) if e not in held]
        lost.close()
        on_lost = torch.full_like(ids_TK, held[0])
        on_others = torch.tensor(others[:2], dtype=ids_TK.dtype).expand(4, 2).contiguous()
        bad = router.dispatch(KEY, x_TH, on_lost, weights_TK)
        good = router.dispatch(KEY, x_TH, on_others, weights_TK)
        assert_right(good.combine(), pool.answer(x_TH, on_others, weights_TK))
        with pytest.raises(ExpertUnavailable):
            bad.combine()
        router.close()


# ---- when something goes wrong in the middle of it ----------------------------------------------


class Stopped(BaseException):
    """Stands for an interrupt from the keyboard."""


def test_an_interrupt_ends_all_calls_and_none_has_a_part_of_its_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, replicas=1) as pool:
        router = pool.router()
        first, second = inputs(4, seed=1), inputs(4, seed=2)
        calls = [router.dispatch(KEY, *first), router.dispatch(KEY, *second)]
        accepted: list[int] = []
        real = LayerTensors.accept

        def interrupted(self: LayerTensors, *given: Any) -> None:
            accepted.append(1)
            if len(accepted) == 2:
                raise Stopped
            real(self, *given)

        monkeypatch.setattr(LayerTensors, "accept", interrupted)
        with pytest.raises(Stopped):
            calls[1].combine()
        monkeypatch.undo()
        with pytest.raises(ClusterError, match="was interrupted, and its calls have ended"):
            calls[0].combine()
        router.wait_ready(10.0)
        assert_right(router.forward(KEY, *first), pool.answer(*first))
        assert settles(lambda: is_free(router))


@pytest.mark.parametrize("step", ["write", "accept"])
def test_a_failing_call_fails_its_own_caller_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with serving(folder, replicas=1) as pool:
        router = pool.router(policy=replace(PATIENT, window=1))
        given, bad = inputs(4, seed=1), inputs(3, seed=2)
        real = getattr(LayerTensors, step)

        def fails(self: LayerTensors, *rest: Any) -> None:
            if self.tokens == 3:
                raise MemoryError("no room")
            real(self, *rest)

        monkeypatch.setattr(LayerTensors, step, fails)
        calls = [router.dispatch(KEY, *given) for _ in range(2)]
        broken = router.dispatch(KEY, *bad)
        calls += [router.dispatch(KEY, *given) for _ in range(2)]
        for call in calls:
            assert_right(call.combine(), pool.answer(*given))
        with pytest.raises(MemoryError):
            broken.combine()
        assert settles(lambda: is_free(router))
        assert set(router.stats().hosts.values()) == {"up"}


def test_answers_that_nobody_heard_for_long_are_not_late(pool: Hosts) -> None:
    # The router sleeps for longer than an answer takes on a busy machine.
    policy = replace(PATIENT, deadline_s=1.5, attempt_s=0.5)
    router = pool.router(policy=policy)
    given = inputs(6, seed=1)
    for _ in range(40):
        router.forward(KEY, *given)
    before = router.stats()
    call = router.dispatch(KEY, *given)
    time.sleep(0.7)
    other = router.dispatch(KEY, *given)
    time.sleep(1.7)
    for one in (other, call):
        assert_right(one.combine(), pool.answer(*given))
    after = router.stats()
    for what in ("hedges", "ejections", "retries"):
        assert getattr(after, what) == getattr(before, what), what
    router.close()


def test_a_call_has_one_result(pool: Hosts) -> None:
    router = pool.router()
    given = inputs(6, seed=1)
    call, cancelled = router.dispatch(KEY, *given), router.dispatch(KEY, *given)
    assert_right(call.combine(), pool.answer(*given))
    cancelled.cancel()
    for one in (call, cancelled):
        with pytest.raises(ClusterError, match="was taken already, or it was cancelled"):
            one.combine()
    cancelled.cancel()
    router.close()
    with pytest.raises(ClusterError, match="is closed"):
        router.dispatch(KEY, *given)
    with pytest.raises(ClusterError, match="is closed"):
        router.wait_ready(1.0)
