"""Which part of a call a router computes itself: whatever has been the fastest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.routing.lending_share import PARTS, LendingShare
from tests.helpers.effort import tries


def run(
    share: LendingShare, seconds: dict[float, float], calls: int, assignments: int = 64
) -> float:
    """Make calls that take as long as their part says; returns the whole time."""
    whole_s = 0.0
    for _ in range(calls):
        choice = share.choose(assignments)
        share.took(choice, seconds[choice.part])
        whole_s += seconds[choice.part]
    return whole_s


TIMES = st.fixed_dictionaries({part: st.floats(1e-5, 1e-1) for part in PARTS})


@settings(max_examples=tries(100))
@given(TIMES)
def test_trying_costs_little(seconds: dict[float, float]) -> None:
    share = LendingShare()
    run(share, seconds, 2 * len(PARTS))  # each part twice
    calls, best_s = 10_000, min(seconds.values())
    # Each of the others may cost half a percent, and is tried again at least every 4,096 calls.
    rare_s = sum(max(0.0, s - best_s) for s in seconds.values()) * (calls / 4096 + 1)
    assert run(share, seconds, calls) <= 1.02 * calls * best_s + rare_s


@pytest.mark.parametrize("best", PARTS)
def test_the_fastest_part_is_used(best: float) -> None:
    share = LendingShare()
    seconds = {part: 1.0 if part == best else 2.0 for part in PARTS}
    run(share, seconds, 50)
    chosen = [share.choose(64).part for _ in range(20)]
    assert chosen.count(best) >= 18


@given(st.lists(st.tuples(st.sampled_from([1, 8, 64]), st.floats(1e-5, 1e-1), st.booleans())))
def test_whether_everything_would_be_chosen_is_known_before(
    calls: list[tuple[int, float, bool]],
) -> None:
    share = LendingShare()
    for assignments, seconds, fails in calls:
        expected = share.keeps_all(assignments)
        assert share.keeps_all(assignments) == expected  # asking changes nothing
        choice = share.choose(assignments)
        assert (choice.part == 1.0) == expected
        if fails:
            share.failed(choice)
        else:
            share.took(choice, seconds)


def test_a_part_that_has_become_faster_is_found() -> None:
    share = LendingShare()
    run(share, {part: 2.0 - part for part in PARTS}, 500)
    # The hosts have less to do than before.
    whole_s = run(share, {part: 1.0 + part for part in PARTS}, 2000)
    assert whole_s <= 1.15 * 2000


def test_sizes_are_apart() -> None:
    share = LendingShare()
    for _ in range(30):
        run(share, {part: 2.0 - part for part in PARTS}, 1, assignments=8)
        run(share, {part: 1.0 + part for part in PARTS}, 1, assignments=4096)
    assert share.choose(8).part == 1.0
    assert share.choose(4096).part == 0.0


def test_one_disturbed_call_changes_nothing() -> None:
    share = LendingShare()
    seconds = {part: 2.0 - part for part in PARTS}
    run(share, seconds, 100)
    choice = share.choose(64)
    while choice.part != 1.0:
        share.took(choice, seconds[choice.part])
        choice = share.choose(64)
    share.took(choice, 1000.0)
    assert run(share, seconds, 100) <= 1.5 * 100


def test_calls_without_assignments_are_harmless() -> None:
    share = LendingShare()
    for _ in range(20):
        share.took(share.choose(0), 0.0)
    assert share.choose(0).part in PARTS


@pytest.mark.parametrize("broken", PARTS)
def test_a_part_whose_calls_fail_is_left(broken: float) -> None:
    share = LendingShare()
    chosen = []
    for _ in range(500):
        choice = share.choose(64)
        chosen.append(choice.part)
        if choice.part == broken:
            share.failed(choice)
        else:
            share.took(choice, 2.0 - choice.part)
    assert chosen.count(broken) <= 4


def test_a_part_that_begins_to_fail_is_left_and_found_again() -> None:
    share = LendingShare()
    seconds = {part: 2.0 if part else 1.0 for part in PARTS}
    run(share, seconds, 100)
    failures = 0
    for _ in range(300):
        choice = share.choose(64)
        if choice.part == 0.0:
            failures += 1
            share.failed(choice)
        else:
            share.took(choice, seconds[choice.part])
    assert failures <= 6
    run(share, seconds, 10_000)
    assert [share.choose(64).part for _ in range(5)].count(0.0) >= 4
