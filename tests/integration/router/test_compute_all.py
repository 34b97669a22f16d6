"""Calls of which everything is lent: computed at once, and dispatched if anything is special."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.router import lent_part
from moesaic.actors.router.router import Router
from moesaic.actors.router.whole_calls import COUNT_AT, PassCheck
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.routing.expert_options import ExpertOptions
from moesaic.cluster.routing.lending_share import LendingShare, ShareChoice
from tests.helpers.pool.lending import SPLITS, borrowing, computed, half_lent, key
from tests.helpers.pool.serving import (
    EXPERTS,
    KEY,
    PATIENT,
    assert_right,
    inputs,
    serving,
)


def refuse(*_: object) -> None:
    raise AssertionError("it was dispatched")


@pytest.mark.parametrize("splits", [False, True])
def test_nothing_is_dispatched(folder: Path, splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[float] = []
    if splits:  # and everything is what was fastest so far
        monkeypatch.setattr(LendingShare, "keeps_all", lambda *_: True)
        monkeypatch.setattr(LendingShare, "choose", lambda _, size: ShareChoice(size, 1.0))
        monkeypatch.setattr(LendingShare, "took", lambda _, __, seconds: took.append(seconds))
    monkeypatch.setattr(Router, "dispatch", refuse)
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1", policy=SPLITS if splits else PATIENT)
        x, ids, weights = inputs(9)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        found = router.forward(KEY, x, ids.long(), weights.double())
        assert_right(found, pool.answer(x, ids, weights))
        stats = router.stats()
        assert (stats.calls, stats.rows, stats.lent) == (2, 18, 36)
        assert int(router.take_load().counts[KEY].sum()) == 36
        assert computed(pool) == 0
        assert len(took) == (2 if splits else 0)
        assert all(seconds > 0 for seconds in took)


def test_ids_are_counted_as_they_were(folder: Path) -> None:
    """A compiled model gives the same memory again and again."""
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(9)
        ids = ids.int()
        expected = torch.bincount(ids.flatten(), minlength=EXPERTS)
        assert router.compute_all(KEY, x, ids, weights) is not None
        ids.zero_()
        assert router.take_load().counts[KEY].tolist() == expected.tolist()


def test_a_call_that_is_better_split_is_dispatched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LendingShare, "keeps_all", lambda *_: False)
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1", policy=SPLITS)
        given = inputs(9)
        assert router.compute_all(KEY, *given) is None
        assert_right(router.forward(KEY, *given), pool.answer(*given))


def test_a_first_call_stirs_the_report(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        router.stirred.clear()
        assert router.compute_all(KEY, *inputs(1)) is not None
        assert router.stirred.is_set()
        router.take_load()
        router.stirred.clear()
        for _ in range(2 * COUNT_AT):
            assert router.compute_all(KEY, *inputs(1)) is not None
        assert router.stirred.is_set()
        assert int(router.take_load().counts[KEY].sum()) == 4 * COUNT_AT


@pytest.mark.parametrize("case", ["options", "dead row", "unused", "unknown", "no row", "shapes"])
def test_a_call_with_anything_special_is_dispatched(folder: Path, case: str) -> None:
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(9)
        match case:
            case "options":
                router.batch.groups = lambda: [(9, ExpertOptions(experts_per_token=1))]
            case "dead row":
                router.batch.dead.add(4)
            case "unused":
                ids[4, 0] = -1
            case "unknown":
                ids[4, 0] = EXPERTS
            case "no row":
                x, ids, weights = x[:0], ids[:0], weights[:0]
            case _:
                weights = weights[:, :1]
        assert router.compute_all(KEY, x, ids, weights) is None
        assert router.stats().calls == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_call_of_which_a_part_is_sent_is_dispatched(folder: Path, exact: bool) -> None:
    with half_lent(folder, exact=exact) as (pool, router):
        given = inputs(9)
        assert router.compute_all(KEY, *given) is None
        assert_right(router.forward(KEY, *given), pool.answer(*given))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sum_over_a_slot_that_changed_meanwhile_is_discarded(
    folder: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, replicas=2, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1")
        x, ids, weights = inputs(20)
        ids[0, 0] = 3
        run = lent_part.ffn.loop_kernel

        def refill() -> None:
            store = pool.holders(3)[0]._store
            store.drop(ExpertVersion(key(3), 1))
            store.put(ExpertVersion(key(3), 1), store.get(ExpertVersion(key(2), 1)))

        def compute(*given: Any) -> None:
            if when == "before":
                refill()
            run(*given)
            if when == "after":
                refill()

        monkeypatch.setattr(lent_part.ffn, "loop_kernel", compute)
        assert router.compute_all(KEY, x, ids, weights) is None
        stats = router.stats()
        assert (stats.calls, stats.rows, stats.lent) == (0, 0, 0)
        assert KEY not in router.take_load().counts


def test_an_error_is_a_failed_try(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[ShareChoice] = []

    def fail(*_: object) -> None:
        raise MemoryError("drill")

    monkeypatch.setattr(LendingShare, "keeps_all", lambda *_: True)
    monkeypatch.setattr(LendingShare, "choose", lambda _, size: ShareChoice(size, 1.0))
    monkeypatch.setattr(LendingShare, "failed", lambda _, choice: failed.append(choice))
    with serving(folder, lends=True) as pool:
        router = borrowing(pool, "host-0", "host-1", policy=SPLITS)
        given = inputs(9)
        with monkeypatch.context() as patch:
            patch.setattr(lent_part.ffn, "loop_kernel", fail)
            with pytest.raises(MemoryError, match="drill"):
                router.forward(KEY, *given)
        assert failed == [ShareChoice(18, 1.0)]
        monkeypatch.undo()
        assert_right(router.forward(KEY, *given), pool.answer(*given))


def test_a_pass_is_checked_by_its_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, lends=True) as pool:
        router, given = borrowing(pool, "host-0", "host-1"), inputs(6)
        checks: list[str] = []
        for name in ("all_finite", "bad_experts"):
            monkeypatch.setattr(lent_part.ffn, name, lambda *_: checks.append("asked"))
        router.begin_step(PassCheck.RESULT)
        out_TH = router.forward(KEY, *given)
        assert checks == []
        assert_right(out_TH, pool.answer(*given))
        assert router.step_is_sound(out_TH)
        for bad in (torch.inf, torch.nan):
            broken_TH = out_TH.clone()
            broken_TH[2, 1] = bad
            assert not router.step_is_sound(broken_TH)
        assert not router.step_is_sound(), "nothing says that all was finite"
        (holder,) = pool.holders(int(given[1][0, 0]))
        holder.release([ExpertVersion(key(int(given[1][0, 0])), 1)])
        assert not router.step_is_sound(out_TH), "it was computed with a slot that was freed"
        router.end_step()


def test_a_pass_that_is_repeated_is_checked_call_by_call(folder: Path) -> None:
    with serving(folder, lends=True) as pool:
        router, given = borrowing(pool, "host-0", "host-1"), inputs(6)
        store = pool.holders(2)[0]._store
        broken = store.get(ExpertVersion(key(2), 1))
        broken["down"][0, 0] = torch.inf
        store.drop(ExpertVersion(key(2), 1))
        store.put(ExpertVersion(key(2), 1), broken)
        given[1][3] = torch.tensor([2, 5])
        router.dispatch(KEY, *given).combine()  # finds out that the slot has changed
        lost: list[list[int]] = []
        router.batch.on_lost = lambda rows, _: lost.append(rows)
        router.begin_step(PassCheck.RESULT)
        out_TH = router.forward(KEY, *given)
        assert lost == []
        assert not router.step_is_sound(out_TH)
        with router.repeating():
            router.forward(KEY, *given)
        router.end_step()
        assert lost == [(given[1] == 2).any(dim=1).nonzero().flatten().tolist()]


def test_a_pass_that_computed_nothing_here_needs_no_result(folder: Path) -> None:
    with serving(folder) as pool:
        router, given = borrowing(pool), inputs(2)
        router.begin_step(PassCheck.RESULT)
        router.forward(KEY, *given)
        assert router.step_is_sound()
        router.end_step()
