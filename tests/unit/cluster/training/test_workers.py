"""Who takes part in the attempts of a run, and where all of them have come to."""

from __future__ import annotations

import pytest

from moesaic.cluster.training.workers import WORKER_LEASE_S, Worker, Workers
from moesaic.proto.errors import BadInput, Superseded

A, B, C = Worker("a", 1), Worker("b", 2), Worker("c", 3)


def begun(*workers: Worker, least: int = 1) -> Workers:
    found = Workers(least)
    for worker in workers:
        found.wait(worker, 0.0)
    assert found.may_begin
    found.begin()
    return found


def test_an_attempt_begins_with_all_that_wait_and_not_with_fewer_than_are_wanted() -> None:
    found = Workers(2)
    assert not found.may_begin
    found.wait(B, 0.0)
    assert not found.may_begin
    found.wait(A, 0.0)
    assert found.may_begin
    found.begin()
    assert found.part == ("a", "b")
    assert not found.may_begin, "they are at work"
    found.wait(C, 0.0)
    assert not found.may_begin, "the attempt under way goes on"
    assert not found.takes_part(C)


def test_a_meeting_is_over_when_all_have_come_however_often() -> None:
    found = begun(A, B)
    assert found.meet(B, "here", 2) is None
    assert found.meet(B, "here", 2) is None
    assert found.meet(A, "there", 0) is None
    assert found.meet(A, "here", 1) == {"a": 1, "b": 2}


def test_after_a_step_all_go_on_with_those_that_wait() -> None:
    found = begun(A, B)
    found.wait(C, 0.0)
    found.stay()
    found.begin()
    assert found.part == ("a", "b", "c")
    assert found.meet(A, "here", 1) is None, "what was said before is forgotten"


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda found: found.leave(B), "b is gone"),
        (lambda found: found.expire(WORKER_LEASE_S), "b is gone"),
        (lambda found: found.wait(B, 0.0), "b has begun anew"),
        (lambda found: found.wait(B._replace(token=9), 0.0), "b has begun anew"),
    ],
)
def test_a_worker_that_is_missing_ends_the_attempt(what: object, why: str) -> None:
    found = begun(A, B)
    found.hear(A, WORKER_LEASE_S)
    assert not found.missing
    assert callable(what)
    what(found)
    assert found.missing == why
    assert not found.takes_part(B)
    assert found.takes_part(A)
    found.wait(A, WORKER_LEASE_S)
    assert found.may_begin


def test_a_process_whose_name_another_one_has_is_told_so() -> None:
    found = begun(A, B)
    heir = B._replace(token=9)
    found.wait(heir, 0.0)
    for say in (lambda: found.wait(B, 0.0), lambda: found.hear(B, 0.0)):
        with pytest.raises(Superseded, match="b: another process takes part under this name"):
            say()
    found.leave(B)
    assert len(found) == 2, "the one that left is not the one that has the name"
    found.wait(A, 0.0)
    found.begin()
    assert found.takes_part(heir)


def test_who_was_not_heard_comes_back_as_a_new_one() -> None:
    found = begun(A, B)
    assert found.expire(WORKER_LEASE_S - 0.1) == []
    found.hear(A, 3.0)
    assert found.expire(WORKER_LEASE_S) == ["b"]
    found.hear(B, WORKER_LEASE_S)
    assert not found.takes_part(B)
    found.wait(B, WORKER_LEASE_S)
    found.wait(A, WORKER_LEASE_S)
    found.begin()
    assert found.part == ("a", "b")


def test_when_no_attempt_can_begin_each_waits_anew() -> None:
    found = Workers()
    found.wait(A, 0.0)
    found.wait(B, 0.0)
    found.fail()
    assert not found.may_begin
    found.wait(A, 0.0)
    assert not found.may_begin
    found.wait(B, 0.0)
    assert found.may_begin


def test_what_does_not_depend_on_an_attempt_is_for_all_that_do_not_wait_for_one() -> None:
    found = begun(A, B)
    found.wait(C, 0.0)
    found.leave(B)
    found.gather(A)
    assert found.part == ("a",)
    assert not found.missing
    found.gather(C)
    assert found.part == ("a", "c")


def test_a_worker_that_has_entered_is_waited_for() -> None:
    found = Workers()
    found.enter(A, 0.0)
    found.wait(B, 0.0)
    assert not found.may_begin
    found.wait(A, 0.0)
    assert found.may_begin
    assert not found.leave(C)


def test_a_question_is_asked_once_in_an_attempt() -> None:
    found = begun(A, B)
    found.meet(A, "here", (1.0,))
    with pytest.raises(BadInput, match=r"here: a has said \(1.0,\) in this attempt, and says"):
        found.meet(A, "here", (2.0,))
