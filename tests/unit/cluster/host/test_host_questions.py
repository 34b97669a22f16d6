"""What a host says of itself: started, live and ready are three questions."""

from __future__ import annotations

from moesaic.cluster.host.questions import TURNS_S, HostQuestions
from moesaic.cluster.host_answers import HostAnswers
from tests.helpers.cluster.fake_clock import FakeClock


def test_a_host_that_starts_is_live_and_nothing_else() -> None:
    clock = FakeClock()
    host = HostQuestions(clock)
    host.listed()
    host.probed()
    clock.now += 10 * TURNS_S  # its start may take as long as it wants
    assert host.answers() == HostAnswers(startup=False, liveness=True, readiness=False)


def test_it_is_ready_once_it_is_listed_and_was_reached() -> None:
    for first, second in (("listed", "probed"), ("probed", "listed")):
        host = HostQuestions(FakeClock())
        host.started(lambda: 100.0)
        assert host.answers() == HostAnswers(startup=True, liveness=True, readiness=False)
        getattr(host, first)()
        assert not host.answers().readiness
        getattr(host, second)()
        assert host.answers().readiness


def test_a_loop_that_hangs_is_neither_live_nor_ready_until_it_turns() -> None:
    clock, turned_at = FakeClock(), 100.0
    host = HostQuestions(clock)
    host.started(lambda: turned_at)
    host.listed()
    host.probed()
    clock.now = turned_at + TURNS_S - 0.1
    assert host.answers() == HostAnswers(startup=True, liveness=True, readiness=True)
    clock.now = turned_at + TURNS_S
    assert host.answers() == HostAnswers(startup=True, liveness=False, readiness=False)
    turned_at = clock.now
    assert host.answers() == HostAnswers(startup=True, liveness=True, readiness=True)


def test_it_stays_ready_without_a_controller_and_not_when_it_leaves() -> None:
    clock = FakeClock()
    host = HostQuestions(clock)
    host.started(clock)
    host.listed()
    host.probed()
    clock.now += 3600
    assert host.answers().readiness
    host.left()
    assert host.answers() == HostAnswers(startup=True, liveness=True, readiness=False)
