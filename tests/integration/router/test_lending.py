"""Routers that compute with the memory that hosts have lent them.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.router import lent_part
from moesaic.actors.router.lent_part import LayerReach
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.host.emulation import Emulation
from moesaic.cluster.host.residency import HostLimits
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.host_health import HostState
from moesaic.cluster.routing.lending_share import PARTS
from moesaic.cluster.versions import WeightVersions
from moesaic.kernels.ffn import ExpertForm, ExpertWeights
from moesaic.kernels.slabs.layer_arithmetic import CpuLayer
from moesaic.proto.errors import BadExpert, CallError, ClusterError
from tests.helpers.pool.lending import SPLITS, borrowing, computed, half_lent, heard, key, mapped
from tests.helpers.pool.serving import (
    EXPERTS,
    HIDDEN,
    KEY,
    LAYER,
    assert_right,
    inputs,
    serving,
)
from tests.helpers.pool.transports import process, settles


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_lent_is_not_sent(folder: Path, exact: bool) -> None:
    with serving(folder, lends=True, exact=exact) as pool:
        router = borrowing(pool, "host-0", "host-1")
        for tokens in (1, 7, 300):
            x, ids, weights = inputs(tokens, seed=tokens)
            assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert router.stats().lent == 2 * 308
        assert computed(pool) == 0
        counts = router.take_load().counts[KEY]
        assert int(counts.sum()) == 2 * 308, "all choices count, wherever they are computed"


def test_nothing_is_lent_unless_both_sides_want_it(folder: Path) -> None:
    for lends, borrows in ((False, True), (True, False)):
        with serving(folder, lends=lends) as pool:
            router = pool.router(borrows=borrows)
            x, ids, weights = inputs(9)
            for _ in range(3):
                assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
            assert router.stats().lent == 0
            assert computed(pool) == 6


def test_an_error_in_what_is_computed_here_ends_the_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: lent_part.LentPart) -> bool:
        raise MemoryError("drill")

    with serving(folder, hosts=1, lends=True) as pool:
        router = borrowing(pool, *pool.placement.hosts)
        call = router.dispatch(KEY, *inputs(3))
        assert not call.done
        monkeypatch.setattr(lent_part.LentPart, "compute", fail)
        with pytest.raises(MemoryError, match="drill"):
            call.compute()
        monkeypatch.undo()
        assert call.done
        with pytest.raises(ClusterError, match="taken already"):
            call.combine()
        x, ids, weights = inputs(3)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


@pytest.mark.parametrize(("numa", "lent"), [(0, False), (1, True), (None, True)])
def test_processes_pinned_to_different_numa_nodes_do_not_lend(
    folder: Path, numa: int | None, lent: bool
) -> None:
    with serving(folder, hosts=1, lends=True) as pool:
        (name,) = pool.placement.hosts
        entries = {name: replace(pool.placement.hosts[name], numa=1)}
        router = pool.router(borrows=True, placed=False, numa=numa)
        router.place(replace(pool.placement, hosts=entries))
        router.wait_ready(10.0)
        if lent:
            heard(router, name)
        x, ids, weights = inputs(9)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        (path,) = router.take_load().paths
        assert path.lent is lent
        assert ("NUMA" in (path.why_sent or "")) is not lent
        assert (computed(pool) == 0) is lent


def test_emulated_hosts_lend_nothing(folder: Path) -> None:
    emulated = HostLimits(emulate=Emulation(call_us=1.0))
    with serving(folder, lends=True, limits=emulated) as pool:
        router = pool.router(borrows=True)
        x, ids, weights = inputs(9)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        assert (router.stats().lent, computed(pool)) == (0, 2)


@pytest.mark.parametrize("exact", [False, True])
def test_a_call_is_half_lent_and_half_sent(folder: Path, exact: bool) -> None:
    with half_lent(folder, exact=exact) as (pool, router):
        mine = 0
        for tokens in (1, 7, 300):
            x, ids, weights = inputs(tokens, top_k=3, seed=tokens)
            ids[tokens // 2, 1] = EXPERTS  # not used
            assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
            mine += int((ids % 2 == 0)[ids < EXPERTS].sum())
        assert router.stats().lent == mine
        assert pool.hosts[1].report().loop.calls == 3
        assert pool.hosts[0].report().loop.calls == 0


def test_exact_bits_do_not_depend_on_lending(folder: Path) -> None:
    x, ids, weights = inputs(77, top_k=4)
    found = []
    with half_lent(folder, exact=True) as (pool, router):
        found.append(router.forward(KEY, x, ids, weights))
        never = pool.router()
        found.append(never.forward(KEY, x, ids, weights))
    with serving(folder, lends=True, exact=True) as pool:
        found.append(borrowing(pool, "host-0", "host-1").forward(KEY, x, ids, weights))
        found.append(pool.router().forward(KEY, x, ids, weights))
    assert all(torch.equal(one, found[0]) for one in found)


def test_calls_in_flight_at_once(folder: Path) -> None:
    with half_lent(folder, exact=False) as (pool, router):
        given = [inputs(tokens, seed=tokens) for tokens in (3, 40, 1, 9)]
        calls = [router.dispatch(KEY, *one) for one in given]
        for call, one in reversed(list(zip(calls, given, strict=True))):
            assert_right(call.combine(), pool.answer(*one))
        ended = router.dispatch(KEY, *given[0])
        ended.cancel()
        assert router._shell.running == {}


# ---- slots that change --------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_a_sum_over_a_slot_that_was_freed_meanwhile_is_discarded(
    folder: Path, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an eviction that a router slept through."""
    with serving(folder, replicas=2, lends=True, exact=exact) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(20)
        run = lent_part.ffn.exact_rows if exact else lent_part.ffn.loop_kernel

        def free_then_compute(*given: Any) -> None:
            monkeypatch.undo()
            store = pool.holders(3)[0]._store
            store.drop(ExpertVersion(key(3), 1))
            store.put(ExpertVersion(key(3), 1), store.get(ExpertVersion(key(2), 1)))
            run(*given)

        name = "exact_rows" if exact else "loop_kernel"
        monkeypatch.setattr(lent_part.ffn, name, free_then_compute)
        ids[0, 0] = 3
        # The hosts answer from their own books, and the one that was tampered with has them wrong.
        pool.holders(3)[0]._residency.release([ExpertVersion(key(3), 1)])
        found = router.dispatch(KEY, x, ids, weights).combine()
        assert_right(found, pool.answer(x, ids, weights))
        assert router.stats().lent == 0
        assert computed(pool) > 0


def test_what_left_is_sent_elsewhere(folder: Path) -> None:
    with serving(folder, replicas=2, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(20)
        router.dispatch(KEY, x, ids, weights).combine()
        for host in pool.hosts:
            host._store.drop(ExpertVersion(key(1), 1))
            host._store.put(ExpertVersion(key(1), 1), host._store.get(ExpertVersion(key(0), 1)))
        wrong = router.dispatch(KEY, x, ids, weights).combine()
        assert wrong.isfinite().all()
        # The first call after the change is discarded and sent; what lies there now is found then.
        assert router.stats().lent == 40


def test_a_new_version_is_used_from_its_placement_on(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(30)
        before = router.forward(KEY, x, ids, weights)
        (host,) = pool.holders(5)
        doubled = {n: 2 * t for n, t in host._store.get(ExpertVersion(key(5), 1)).items()}
        host._store.put(ExpertVersion(key(5), 2), doubled)
        assert torch.equal(router.forward(KEY, x, ids, weights), before)
        router.place(
            replace(
                pool.placement,
                id=PlacementId(1, 9),
                versions=WeightVersions(experts={key(5): 2}),
            )
        )
        after = router.forward(KEY, x, ids, weights)
        changed = (ids == 5).any(dim=1)
        assert torch.equal(after[~changed], before[~changed])
        assert not torch.allclose(after[changed], before[changed])
        assert router.stats().lent == 3 * 60


def test_a_model_that_replaces_another_brings_its_own_weights(folder: Path) -> None:
    """It has the same name and the same version, and the memory of the old one is still mapped."""
    with serving(folder, hosts=1, lends=True) as pool:
        router = borrowing(pool, "host-0")
        given = inputs(5)
        before = router.forward(KEY, *given)
        store = pool.hosts[0]._store
        old = {e: store.get(ExpertVersion(key(e), 1)) for e in range(EXPERTS)}
        store.add_model(replace(pool.ref, config={"another": True}))
        for expert, tensors in old.items():
            doubled = {name: 2 * tensor for name, tensor in tensors.items()}
            store.put(ExpertVersion(key(expert), 1), doubled)
        after = router.forward(KEY, *given)
        assert not torch.allclose(after, before)
        assert computed(pool) == 1
        lent = router.stats().lent

        def lent_again() -> bool:
            router._look_after([])
            assert_right(router.forward(KEY, *given), after)
            return router.stats().lent > lent

        assert settles(lent_again)


# ---- what goes wrong ----------------------------------------------------------------------------


def test_rows_that_are_not_finite_are_reported_as_those_of_hosts_are(folder: Path) -> None:
    with half_lent(folder, exact=False) as (pool, router):
        lender = pool.hosts[0]._store
        broken = lender.get(ExpertVersion(key(2), 1))
        broken["down"][0, 0] = torch.inf
        lender.drop(ExpertVersion(key(2), 1))
        lender.put(ExpertVersion(key(2), 1), broken)
        x, ids, weights = inputs(8)
        ids[3] = torch.tensor([2, 5])
        router.forward(KEY, x, ids, weights)  # finds out that the slot has changed
        lost: list[tuple[list[int], Exception]] = []
        router.batch.on_lost = lambda rows, error: lost.append((rows, error))
        out = router.forward(KEY, x, ids, weights)
        hit = (ids == 2).any(dim=1)
        assert hit.any()
        ((rows, error),) = lost
        assert rows == hit.nonzero().flatten().tolist()
        assert isinstance(error, BadExpert)
        assert "expert 2 of layer 1 of m" in str(error)
        assert out[~hit].isfinite().all()


def test_rows_that_do_not_fit_get_the_hosts_error(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(3)
        with pytest.raises(CallError):
            router.forward(KEY, x.bfloat16(), ids, weights)
        with pytest.raises(CallError):
            router.forward(KEY, torch.cat([x, x], dim=1), ids, weights)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


def test_a_report_says_how_each_host_is_reached(folder: Path) -> None:
    with half_lent(folder, exact=False) as (pool, router):
        here, other = router.take_load().paths
        assert (here.host, here.transport, here.lent) == ("host-0", "shm", True)
        assert (other.host, other.transport, other.lent) == ("other", "shm", False)
        assert here.why_sent is None
        assert "has lent nothing" in str(other.why_sent)
        plain = pool.router()
        assert all("borrows nothing" in str(path.why_sent) for path in plain.take_load().paths)


def test_a_killed_host_takes_nothing_away(folder: Path) -> None:
    passed_s = 0.0
    with (
        serving(folder, hosts=1) as pool,
        process("serve", str(folder), "other", "cpu", "lends") as (child, line),
    ):
        entry = HostEntry(**json.loads(line))
        there = (Replica(entry.host, 1.0),)

        def placed(epoch: int, *hosts: HostEntry) -> Placement:
            replicas = (there if hosts else (),) * EXPERTS
            layers = dict.fromkeys(pool.placement.layers, LayerPlacement(replicas))
            return Placement(PlacementId(1, epoch), {one.host: one for one in hosts}, layers)

        router = replace(pool, placement=placed(2, entry)).router(
            borrows=True, clock=lambda: time.monotonic() + passed_s
        )
        heard(router, "other")
        given, experts = inputs(30), [key(expert) for expert in range(EXPERTS)]
        expected = pool.answer(*given)
        assert_right(router.forward(KEY, *given), expected)
        child.kill()
        child.wait()
        for epoch in range(3, 6):
            router._look_after([])
            assert router.has(experts)
            assert_right(router.forward(KEY, *given), expected)
            # No host has its experts, until its successor has loaded them.
            router.place(placed(epoch))
        stats = router.stats()
        assert (stats.lent, stats.retries, stats.rows_lost) == (4 * 60, 0, 0)
        passed_s = router.policy.orphan_s - 1.0
        router.take_load()
        assert_right(router.forward(KEY, *given), expected)
        passed_s = router.policy.orphan_s
        router.take_load()
        assert not router.has(experts)
        assert settles(lambda: mapped() == 0)
        router.place(replace(pool.placement, id=PlacementId(1, 7)))
        router.wait_ready(10.0)
        assert_right(router.forward(KEY, *given), expected)
        assert (router.stats().lent, computed(pool)) == (5 * 60, 1)


def test_nothing_stays_open(folder: Path) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with serving(folder, lends=True) as pool:
            router = borrowing(pool, "host-0", "host-1")
            router.forward(KEY, *inputs(5))

    once()
    assert settles(lambda: mapped() == 0)
    # What other tests left open may still be closed meanwhile; three rounds would leak more.
    before = descriptors()
    for _ in range(3):
        once()
    assert settles(lambda: descriptors() <= before)
    assert mapped() == 0


def test_layers_without_a_form_are_sent(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        given = inputs(4)
        other = LayerKey("m", 0)
        del router._lent_experts._forms[other]  # pyright: ignore[reportIndexIssue]
        assert_right(router.forward(other, *given), pool.answer(*given, layer=0))
        assert router.stats().lent == 0
        assert computed(pool) == 2


@pytest.mark.parametrize("exact", [False, True])
def test_a_call_may_be_computed_in_part_here_and_in_part_there(folder: Path, exact: bool) -> None:
    with serving(folder, lends=True, exact=exact) as pool:
        plain = pool.router()
        router = borrowing(pool, "host-0", "host-1", policy=SPLITS)
        for tokens in (1, 7, 300):
            given = inputs(tokens)
            expected = plain.forward(KEY, *given)
            for _ in range(2 * len(PARTS)):
                before = computed(pool), router.stats().lent
                result = router.forward(KEY, *given)
                if exact:
                    assert torch.equal(result, expected)
                assert_right(result, expected)
                assert (computed(pool), router.stats().lent) != before
        # All that was not computed here was sent.
        assert 0 < router.stats().lent < 2 * len(PARTS) * 308 * 2
        counts = router.take_load().counts[KEY]
        assert counts.sum() == 2 * len(PARTS) * 308 * 2


def test_no_part_is_sent_to_a_host_that_is_gone(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1", policy=SPLITS)
        given = inputs(50)
        router._dispatcher.hosts["host-0"].state = HostState.CONNECTING
        before = computed(pool)
        for _ in range(2 * len(PARTS)):
            assert_right(router.forward(KEY, *given), pool.answer(*given))
        assert computed(pool) == before
        assert router.stats().lent == 2 * len(PARTS) * 100


@pytest.mark.parametrize("part", PARTS)
def test_each_host_keeps_the_same_part_of_its_experts(part: float) -> None:
    hosts = ["a" if expert < 4 else "b" for expert in range(EXPERTS)]
    form = ExpertForm(transposed=False, activate=torch.relu)
    one = ExpertWeights(torch.zeros(1, HIDDEN), torch.zeros(HIDDEN, 1))
    experts = dict.fromkeys(range(EXPERTS), one)
    reach = LayerReach(CpuLayer(form, experts), experts, [], hosts, HIDDEN, torch.float32)
    assert reach.can_split
    drawn = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, EXPERTS, (500, 2), generator=drawn).numpy()
    here, there = reach.split(ids, part)
    assert ((here >= 0) + (there >= 0) == (ids >= 0)).all()
    assert not {*here[here >= 0].tolist()} & {*there[there >= 0].tolist()}
    for first in (0, 4):
        mine = ((here >= first) & (here < first + 4)).sum()
        whole = ((ids >= first) & (ids < first + 4)).sum()
        # An expert's rows stay together, and a host has four experts.
        assert abs(mine / whole - part) <= 0.15


def test_a_host_that_dies_with_a_part_of_a_call_loses_nothing(folder: Path) -> None:
    with (
        serving(folder, hosts=1) as pool,
        process("serve", str(folder), "other", "cpu", "lends") as (child, line),
    ):
        entry = HostEntry(**json.loads(line))
        replicas = ((Replica("other", 1.0),),) * EXPERTS
        layers = dict.fromkeys(pool.placement.layers, LayerPlacement(replicas))
        placement = Placement(PlacementId(1, 2), {"other": entry}, layers)
        for exact in (frozenset[str](), frozenset({"m"})):
            router = replace(pool, placement=replace(placement, exact=exact)).router(
                borrows=True, policy=SPLITS
            )
            heard(router, "other")
            given = inputs(40)
            calls = [router.dispatch(KEY, *given) for _ in range(2 * len(PARTS))]
            if exact:
                child.kill()
                child.wait()
            for call in calls:
                assert_right(call.combine(), pool.answer(*given))
            assert router.stats().rows_lost == 0
            assert router.has([key(expert) for expert in range(EXPERTS)])


def test_slabs_may_change_while_a_new_placement_is_looked_at(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        given, other = inputs(4), LayerKey("m", 0)
        for one in (KEY, other):
            router.forward(one, *given)
        newer = replace(pool.placement, id=PlacementId(1, 2))
        lent = router._lent_experts
        assert lent.reach(KEY, newer) is not None
        ((named, slab), *_) = lent._slabs.items()
        lent.take_slab(pool.placement.hosts[named.host], "m", slab)
        assert lent.reach(other, newer) is not None
        lent.changed(KEY)
        assert lent.reach(KEY, replace(newer, id=PlacementId(1, 3))) is not None


def test_has_says_no_of_what_cannot_be_computed(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        hosts = router._dispatcher.hosts
        for health in hosts.values():
            health.state = HostState.DOWN
        lent, placement = router._lent_experts, pool.placement
        assert lent.has(key(0), placement)
        assert not lent.has(key(EXPERTS), placement)
        assert not lent.has(key(-1), placement)
        assert not lent.has(key(0), None)
        assert not lent.has(key(0), replace(placement, layers={}))
        assert not lent.has(ExpertKey("n", LAYER, 0), placement)
