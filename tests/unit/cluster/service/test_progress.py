"""Readiness: right both ways, at the second, whatever happens to trunk, host and controller."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moesaic.cluster.service.progress import ASK_AFTER_S, STALLED_S, ModelProgress, TrunkHeartbeat


def heard(
    steps: int = 0, *, busy: bool = True, beats: bool = True, trunk: str = "a"
) -> TrunkHeartbeat:
    return TrunkHeartbeat(trunk=trunk, steps=steps, busy=busy, beats=beats)


def test_idle_is_ready_and_nobody_is_asked() -> None:
    progress = ModelProgress()
    assert progress.is_ready(0.0)
    assert progress.is_ready(1e6)
    assert not progress.wants_to_hear(1e6)
    progress.began(1e6)
    progress.moved(1e6 + 1)
    progress.ended(1e6 + 1)
    assert progress.is_ready(2e6)
    assert not progress.wants_to_hear(2e6)


def test_a_probe_of_an_idle_model_finds_a_frozen_trunk_and_a_well_one() -> None:
    progress = ModelProgress()
    progress.probed(100.0)
    assert progress.is_ready(100.0 + STALLED_S - 0.1)
    assert not progress.wants_to_hear(100.0 + ASK_AFTER_S - 0.1)
    assert progress.wants_to_hear(100.0 + ASK_AFTER_S)
    progress.probed(100.0 + STALLED_S - 0.1)  # a probe is no progress
    assert not progress.is_ready(100.0 + STALLED_S)
    progress.heard(heard(busy=False, beats=False), 111.0)  # its loop hangs
    assert not progress.is_ready(111.0)
    progress.heard(heard(busy=False), 112.0)
    assert progress.is_ready(1e6)
    assert not progress.in_question


def test_a_probe_asks_no_trunk_that_may_have_been_scaled_away() -> None:
    progress = ModelProgress(wake_s=60.0)
    progress.probed(100.0)
    assert not progress.in_question
    assert progress.is_ready(1e6)


def test_work_that_begins_behind_a_probe_is_work_as_any() -> None:
    progress = ModelProgress()
    progress.probed(100.0)
    progress.began(101.0)
    progress.heard(heard(steps=3), 102.0)
    progress.heard(heard(steps=4), 103.0)
    assert progress.is_ready(103.0 + STALLED_S - 0.1)
    assert not progress.is_ready(103.0 + STALLED_S)
    progress.moved(120.0)
    progress.ended(120.0)
    assert progress.is_ready(1e6)


def test_frozen_with_work_is_not_ready_until_it_goes_on() -> None:
    progress = ModelProgress()
    progress.began(0.0)
    progress.moved(5.0)
    assert progress.is_ready(5.0 + STALLED_S - 0.1)
    assert not progress.is_ready(5.0 + STALLED_S)
    progress.moved(40.0)
    assert progress.is_ready(40.0)


def test_frozen_without_work_is_ready_until_work_comes() -> None:
    progress = ModelProgress()
    assert progress.is_ready(100.0)
    progress.began(100.0)
    assert progress.is_ready(100.0 + STALLED_S - 0.1)
    assert not progress.is_ready(100.0 + STALLED_S)


def test_callers_that_give_up_do_not_make_a_frozen_trunk_ready() -> None:
    progress = ModelProgress()
    progress.began(0.0)
    progress.ended(STALLED_S)
    assert not progress.is_ready(1000.0)
    assert progress.wants_to_hear(1000.0)
    progress.began(1000.0)  # nor does a new one
    assert not progress.is_ready(1000.1)
    progress.heard(heard(busy=False), 1001.0)
    assert progress.is_ready(1001.0)


def test_killed_with_work_counts_from_its_last_step() -> None:
    progress = ModelProgress()
    progress.began(0.0)
    progress.moved(3.0)
    progress.ended(3.1, lost=True)
    assert progress.is_ready(3.1)  # a quick restart is no outage
    assert not progress.is_ready(3.0 + STALLED_S)
    progress.heard(heard(busy=False), 60.0)
    assert progress.is_ready(60.0)
    assert not progress.wants_to_hear(1e6)


def test_full_is_ready_as_long_as_steps_go_on() -> None:
    progress = ModelProgress()
    for n in range(5000):
        progress.began(n / 1000)
    for n in range(100):  # one token for one of them
        progress.moved(5.0 + n)
        assert progress.is_ready(5.0 + n + STALLED_S / 2)


def test_a_long_prompt_steps_without_a_token() -> None:
    progress = ModelProgress()
    progress.began(0.0)
    assert not progress.wants_to_hear(ASK_AFTER_S - 0.1)
    assert progress.wants_to_hear(ASK_AFTER_S)
    for n in range(3, 100):
        progress.heard(heard(n), float(n))
    assert progress.is_ready(99.0 + STALLED_S - 0.1)
    # It answers, and steps no more: its loop is frozen, or all it has is parked.
    for n in range(100, 120):
        progress.heard(heard(99), float(n))
    assert not progress.is_ready(120.0)


def test_an_engine_that_stands_still_is_no_progress() -> None:
    progress = ModelProgress()
    progress.began(0.0)
    for n in range(20):
        progress.heard(heard(n, busy=False, beats=False), float(n))
    assert not progress.is_ready(20.0)


def test_one_trunk_of_several_is_enough() -> None:
    progress = ModelProgress()
    progress.began(0.0)
    # The request is with "a", which is frozen; "b" has nothing to do.
    progress.heard(heard(7, busy=False, trunk="b"), 9.0)
    assert progress.is_ready(9.0 + STALLED_S - 0.1)
    # Steps are compared with those of the same trunk.
    progress.heard(heard(5, trunk="c"), 12.0)
    progress.heard(heard(7, trunk="d"), 18.9)
    assert not progress.is_ready(19.0)


def test_a_trunk_that_starts_because_it_is_asked_has_its_time() -> None:
    progress = ModelProgress(wake_s=60.0)
    progress.began(0.0)
    for n in range(59):
        progress.waking(float(n))
        assert progress.is_ready(float(n))
    for n in range(60, 80):
        progress.waking(float(n))
    assert not progress.is_ready(58.0 + STALLED_S)
    # It is never kept awake by questions.
    progress.ended(80.0, lost=True)
    assert not progress.wants_to_hear(90.0)
    assert progress.is_ready(90.0)


@pytest.mark.parametrize("wake_s", [0.0, 30.0])
def test_work_behind_idleness_is_counted_from_its_own_beginning(wake_s: float) -> None:
    progress = ModelProgress(wake_s=wake_s)
    for start in (0.0, 1e3, 1e6):
        progress.began(start)
        assert progress.is_ready(start + STALLED_S - 0.1)
        progress.moved(start + 1)
        progress.ended(start + 1)


class Readiness(RuleBasedStateMachine):
    """Against the sentence itself: work is pending, or was lost, or a probe is not answered for,
    and nothing moved for so long."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = ModelProgress()
        self.now = 0.0
        self.pending = 0
        self.doubted = False
        self.since = 0.0  # when the last thing moved, or work began
        self.steps: dict[str, int] = {}

    @initialize()
    def start(self) -> None:
        assert self.progress.is_ready(self.now)

    @rule(seconds=st.floats(0.01, 15.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begins(self) -> None:
        if not self.pending and not self.doubted:
            self.since, self.steps = self.now, {}
        self.pending += 1
        self.progress.began(self.now)

    @rule()
    def is_probed(self) -> None:
        if not self.pending and not self.doubted:
            self.since, self.steps, self.doubted = self.now, {}, True
        self.progress.probed(self.now)

    @precondition(lambda self: self.pending)
    @rule()
    def token(self) -> None:
        self.since, self.doubted = self.now, False
        self.progress.moved(self.now)

    @precondition(lambda self: self.pending)
    @rule(lost=st.booleans())
    def ends(self, lost: bool) -> None:
        self.pending -= 1
        self.doubted |= lost or self.now - self.since >= STALLED_S
        self.progress.ended(self.now, lost=lost)

    @rule(trunk=st.sampled_from("ab"), more=st.integers(0, 2), busy=st.booleans())
    def says(self, trunk: str, more: int, busy: bool) -> None:
        known = trunk in self.steps
        steps = self.steps.get(trunk, 0) + more
        if not busy or (known and more):
            self.since, self.doubted = self.now, False
        self.steps[trunk] = steps
        self.progress.heard(heard(steps, busy=busy, trunk=trunk), self.now)

    @invariant()
    def ready_is_what_the_sentence_says(self) -> None:
        waits = self.pending > 0 or self.doubted
        expected = not (waits and self.now - self.since >= STALLED_S)
        assert self.progress.is_ready(self.now) == expected
        assert self.progress.in_question == waits
        if self.progress.wants_to_hear(self.now):
            assert waits  # nobody wakes what sleeps


TestReadiness: Any = Readiness.TestCase
