"""The router against hosts that refuse, fail or are lost, and against experts that fail.

Hosts are threads; where a test needs calls to meet in a host, it holds the host's loop.

Shape suffixes: T = tokens, K = assignments of a token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host import compute
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, first_versions
from moesaic.cluster.host.residency import HostLimits
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.proto.errors import ExpertUnavailable, MoesaicError
from tests.helpers.pool.served_pool import held
from tests.helpers.pool.serving import (
    EXPERTS,
    HASTY,
    HIDDEN,
    KEY,
    KINDS,
    LAYER,
    assert_right,
    in_background,
    inputs,
    sent,
    serving,
)
from tests.helpers.pool.transports import settles


def used(ids_TK: Tensor, held_by: set[int]) -> list[int]:
    """Rows that use one of these experts."""
    return [row for row, ids in enumerate(ids_TK.tolist()) if held_by & set(ids)]


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", KINDS)
def test_not_here_is_rerouted_inside_the_call(folder: Path, transport: TransportChoice) -> None:
    asked: list[None] = []
    with serving(folder, replicas=2) as pool:
        router = pool.router(transport=transport, refresh=lambda: asked.append(None))
        every = [ExpertKey("m", LAYER, expert) for expert in range(EXPERTS)]
        pool.hosts[0].release(first_versions(every))
        for seed in range(4):
            x, ids, weights = inputs(6, seed=seed)
            assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert pool.hosts[0].report().loop.refused > 0
        assert router.stats().retries > 0
        assert router.stats().ejections == 0
        assert asked, "the router did not ask for a newer placement"


def test_busy_is_sent_again(folder: Path) -> None:
    limits = HostLimits(max_rows=4, max_batch_rows=4, max_queue_rows=4)
    with serving(folder, hosts=1, limits=limits) as pool, in_background() as start:
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
        real = compute.compute

        def fail(store: Any, *args: Any, **kwargs: Any) -> Any:
            if store is broken._store:
                raise IndexError("drill")
            return real(store, *args, **kwargs)

        for host in pool.hosts:
            monkeypatch.setattr(host._loop, "_compute_batch", fail)
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
        # A later layer of the same step: the router neither sends the rows again nor waits.
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
            tensors = host._store.get(ExpertVersion(KEY.expert(5), 1))
            tensors["down"] = torch.full_like(tensors["down"], torch.nan)
            host._store.put(ExpertVersion(KEY.expert(5), 1), tensors)
            x, ids, weights = inputs(20)
            rows = used(ids, {5})
            out = router.forward(KEY, x, ids, weights)
            expected = pool.answer(x, ids, weights)
            expected[rows] = 0.0
            assert_right(out, expected)
            ((reported, error),) = lost
            assert (reported, error.code) == (rows, "BadExpert")
            assert str(error) == "expert 5 of layer 1 of m: the output has NaN or infinite values"
