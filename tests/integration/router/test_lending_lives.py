"""Lent experts while hosts, placements and calls come, change and go."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.router.layer_tensors import LayerTensors
from moesaic.actors.router.lent_part import LentPart
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.host.emulation import Emulation
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.events import Disconnect
from moesaic.cluster.routing.lending_share import LendingShare
from moesaic.kernels.slabs.slab import Slab
from tests.helpers.pool.lending import SPLITS, borrowing, computed, half_lent, heard, key, mapped
from tests.helpers.pool.serving import (
    EXPERTS,
    KEY,
    assert_right,
    inputs,
    serving,
)
from tests.helpers.pool.transports import settles


def test_a_host_that_cannot_lend_at_the_moment_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(_: Slab) -> int:
        raise OSError(errno.EMFILE, "no descriptors")

    monkeypatch.setattr(Slab, "lend", no_descriptors)
    with serving(folder, lends=True) as pool:
        router = pool.router(borrows=True)
        given = inputs(9)
        for _ in range(3):
            assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert router.stats().lent == 0
        assert all(host._loop.alive for host in pool.hosts)


def test_a_host_that_emulates_from_now_on_takes_back_what_it_lent(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        given = inputs(9)
        router.forward(KEY, *given)
        lent = router.stats().lent
        for host in pool.hosts:
            host.emulate(Emulation(call_us=1.0))
        heard(router)
        assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert (router.stats().lent, computed(pool)) == (lent, 2)
        for host in pool.hosts:
            host.emulate(None)
        heard(router, "host-0", "host-1")
        assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert router.stats().lent == 2 * lent


def test_a_router_whose_calls_are_all_lent_still_hears_its_hosts(folder: Path) -> None:
    with half_lent(folder, exact=False) as (pool, _):
        here = pool.hosts[0].name
        layers = {
            one: LayerPlacement(((Replica(here, 1.0),),) * EXPERTS) for one in pool.placement.layers
        }
        pool.hosts[0].load([(pool.ref, pool.shape)], [ExpertVersion(key(e), 1) for e in range(8)])
        router = pool.router(borrows=True, placed=False)
        entries = {here: pool.placement.hosts[here]}
        router.place(Placement(PlacementId(1, 5), entries, layers))
        heard(router, here)
        router.place(Placement(PlacementId(1, 6), pool.placement.hosts, layers))
        given = inputs(3)

        def other_is_up() -> bool:
            router.forward(KEY, *given)
            return router.stats().hosts["other"] == "up"

        assert settles(other_is_up)
        assert pool.hosts[0].report().loop.calls == 0


def test_an_idle_router_lets_memory_go(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        router.forward(KEY, *inputs(3))
        assert mapped() == 2
        for host in pool.hosts:
            host.emulate(Emulation(call_us=1.0))
        heard(router)
        assert mapped() == 0


def test_a_placement_that_changes_only_shares_finds_nothing_anew(folder: Path) -> None:
    with serving(folder, replicas=2, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        given = inputs(5)
        router.forward(KEY, *given)
        found = router._lent_experts.reach(KEY, router._dispatcher.placement)
        shared = tuple(
            tuple(Replica(one.host, share) for one, share in zip(at, (0.9, 0.1), strict=True))
            for at in pool.placement.layers[KEY].replicas
        )
        layers = {**pool.placement.layers, KEY: LayerPlacement(shared)}
        router.place(replace(pool.placement, id=PlacementId(1, 2), layers=layers))
        assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert router._lent_experts.reach(KEY, router._dispatcher.placement) is found
        (first, *_) = pool.hosts
        fewer = tuple(tuple(one for one in at if one.host != first.name) for at in shared)
        layers = {**layers, KEY: LayerPlacement(fewer)}
        router.place(replace(pool.placement, id=PlacementId(1, 3), layers=layers))
        assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert router._lent_experts.reach(KEY, router._dispatcher.placement) is not found


def test_what_cannot_be_used_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(*_: object) -> None:
        raise RuntimeError("this torch has another layout")

    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        for one in router._lent_experts._slabs.values():
            monkeypatch.setattr(one, "view", unusable)
        given = inputs(3)
        assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert (router.stats().lent, computed(pool)) == (0, 2)


@pytest.mark.parametrize("at", ["compute", "accept_lent"])
def test_an_interrupt_leaves_no_call_behind(
    folder: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with half_lent(folder, exact=False) as (pool, router):
        given = inputs(8)
        call = router.dispatch(KEY, *given)
        with monkeypatch.context() as patch:
            patch.setattr(LentPart if at == "compute" else LayerTensors, at, interrupt)
            with pytest.raises(KeyboardInterrupt):
                call.combine()
        assert router._shell.running == {}
        assert router._dispatcher._calls == {}
        assert_right(router.forward(KEY, *given), pool.answer(*given))


def test_a_call_that_begins_again_counts_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        monkeypatch.setattr(LentPart, "compute", lambda _: False)
        given = inputs(9)
        assert_right(router.dispatch(KEY, *given).combine(), pool.answer(*given))
        stats = router.stats()
        assert (stats.calls, stats.rows, stats.lent) == (1, 9, 0)
        assert int(router.take_load().counts[KEY].sum()) == 18


def test_a_part_that_neither_side_could_compute_is_sent_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host takes it, and the slots here were freed before they could make up for that."""
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1", policy=SPLITS)
        hosts, begin = router._dispatcher.hosts, router._dispatcher.begin
        next_part = LendingShare._next

        def begin_without_hosts(*args: Any, **options: Any) -> Any:
            for health in hosts.values():
                health.went_down(options["now"])
            router._shell.execute([Disconnect(name) for name in hosts])
            monkeypatch.setattr(router._dispatcher, "begin", begin)
            return begin(*args, **options)

        monkeypatch.setattr(LendingShare, "_next", lambda *given: next_part(*given) and 0.5)
        monkeypatch.setattr(router._dispatcher, "begin", begin_without_hosts)
        monkeypatch.setattr(LentPart, "make_up", lambda *_: False)
        given = inputs(40)
        assert_right(router.dispatch(KEY, *given).combine(), pool.answer(*given))
        stats = router.stats()
        assert (stats.calls, stats.rows, stats.rows_lost) == (1, 40, 0)
        assert computed(pool) > 0
        assert router._shell.running == {}


def test_the_models_own_dtypes_change_nothing(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        given = inputs(9)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = router.forward(KEY, *given)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_right(found, pool.answer(*given))
        assert router.stats().lent == 18
