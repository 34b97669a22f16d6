"""What `docs/failures.md` promises of hosts and connections, on real transports.

Hosts are threads of this process. Shape suffixes: T = tokens, H = hidden size, K = assignments.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moesaic.actors.host import compute
from moesaic.actors.router.router import Router
from moesaic.actors.transport.grpc.session import GrpcSession
from moesaic.actors.transport.shm import ShmSession
from moesaic.cluster.placement import Placement, PlacementId
from moesaic.cluster.routing.transports import TransportChoice
from tests.helpers.pool.proxy import Proxy, proxied
from tests.helpers.pool.served_pool import held
from tests.helpers.pool.serving import KEY, KINDS, PATIENT, Hosts, assert_right, inputs, serving
from tests.helpers.pool.transports import settles

SESSIONS = {"shm": ShmSession, "grpc": GrpcSession, "group": GrpcSession}
# Calls after which it is known how long answers take.
LEARNING = 40


def ask(pool: Hosts, router: Router, calls: int = 1, *, tokens: int = 6) -> None:
    for seed in range(calls):
        x, ids, weights = inputs(tokens, seed=seed)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


@contextmanager
def through_proxy(pool: Hosts, **options: Any) -> Iterator[tuple[Router, Proxy]]:
    """A router that reaches the first host through a proxy."""
    name = pool.hosts[0].name
    with proxied(pool.placement.hosts[name].grpc_address) as proxy:
        entry = replace(pool.placement.hosts[name], grpc_address=proxy.address)
        router = pool.router(transport="grpc", placed=False, **options)
        router.place(
            Placement(
                PlacementId(1, 9), {**pool.placement.hosts, name: entry}, pool.placement.layers
            )
        )
        router.wait_ready(10.0)
        yield router, proxy
        router.close()


# ---- bytes change on the way --------------------------------------------------------------------


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_call_or_an_answer_that_was_changed_is_sent_again(
    folder: Path, to_host: bool, replicas: int
) -> None:
    with serving(folder, replicas=replicas) as pool, through_proxy(pool) as (router, proxy):
        ask(pool, router)
        changed: list[int] = []

        def flip(data: bytes, towards_host: bool) -> bytes:
            # Messages with tensors are this large, and tensors are all around their middle.
            if towards_host is not to_host or len(data) < 700 or len(changed) >= 3:
                return data
            changed.append(len(data))
            middle = len(data) // 2
            return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]

        proxy.change = flip
        retries = router.stats().retries
        for seed in range(8):
            x, ids, weights = inputs(16, seed=seed)
            assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert len(changed) == 3
        assert router.stats().retries - retries >= 3
        assert router.stats().ejections == 0


# ---- answers that do not come -------------------------------------------------------------------


@pytest.mark.parametrize("transport", KINDS)
def test_lost_answers_cost_a_deadline_each_and_no_slot_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch, transport: TransportChoice
) -> None:
    """More answers are lost than there are slots."""
    policy = replace(PATIENT, attempt_s=0.05, window=3, retry_per_s=1000.0)
    session = SESSIONS[transport]
    with serving(folder, hosts=1) as pool:
        router = pool.router(policy=policy, transport=transport)
        ask(pool, router)
        real, answers = session.send_reply, iter(range(1_000_000))

        def lossy(self: Any, frame: Any, buffer: Tensor) -> None:
            if next(answers) % 3:
                real(self, frame, buffer)

        monkeypatch.setattr(session, "send_reply", lossy)
        ask(pool, router, 12)
        monkeypatch.undo()
        ask(pool, router, 3)
        stats = router.stats()
        assert stats.ejections >= 5
        assert stats.hosts == {pool.hosts[0].name: "up"}
        free = settles(lambda: _free(router))
        assert free


def _free(router: Router) -> bool:
    """Hear what is still to come; True once no slot is taken."""
    with router._lock:
        router._waiting.until(time.monotonic() + 0.02)
    return not any(health.occupied for health in router._dispatcher.hosts.values())


@pytest.mark.parametrize("transport", KINDS)
def test_a_frozen_host_is_overtaken_long_before_its_deadline(
    folder: Path, transport: TransportChoice
) -> None:
    policy = replace(PATIENT, attempt_s=25.0, hedge_burst=100.0)
    with serving(folder, replicas=2) as pool:
        router = pool.router(policy=policy, transport=transport)
        ask(pool, router, LEARNING)
        with held(pool.hosts[0]):
            ask(pool, router, LEARNING)
            assert router.stats().hedge_wins > 0
        assert router.stats().ejections == 0
        assert settles(lambda: _free(router))


def test_a_slow_host_gets_few_calls_and_more_when_it_is_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = replace(PATIENT, attempt_s=25.0, avoid_s=5.0, hedge_burst=100.0)
    with serving(folder, replicas=2) as pool:
        slow, _ = pool.hosts
        router = pool.router(policy=policy)
        ask(pool, router, LEARNING)
        real = compute.compute

        def slowly(store: Any, *args: Any, **kwargs: Any) -> Any:
            answers = real(store, *args, **kwargs)
            if store is slow._store:
                time.sleep(0.2)
            return answers

        for host in pool.hosts:
            monkeypatch.setattr(host._loop, "_compute_batch", slowly)
        before = slow.report().loop.calls
        ask(pool, router, LEARNING)
        assert slow.report().loop.calls - before < LEARNING // 4
        assert router.stats().hedge_wins > 0
        monkeypatch.undo()
        assert settles(lambda: _free(router))
        health = router._dispatcher.hosts[slow.name]
        health.avoid_until = 0.0  # as if the time had passed
        before = slow.report().loop.calls
        ask(pool, router, LEARNING)
        assert slow.report().loop.calls - before > LEARNING // 4


# ---- connections --------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_connection_that_is_cut_in_the_middle_of_calls_is_made_again(
    folder: Path, replicas: int
) -> None:
    with serving(folder, replicas=replicas) as pool, through_proxy(pool) as (router, proxy):
        for _ in range(3):
            cut: list[int] = []

            def cut_once(data: bytes, towards_host: bool, cut: list[int] = cut) -> bytes:
                if not towards_host and len(data) > 300 and not cut:
                    cut.append(len(data))
                    proxy.cut()
                return data

            proxy.change = cut_once
            router.wait_ready(10.0)
            ask(pool, router, 4, tokens=16)
            assert cut
        assert router.stats().retries >= 3
