"""The timeline: each event once, and nothing at the beginning."""

from __future__ import annotations

from moesaic.cluster.page_feed import timeline as timeline_module
from moesaic.cluster.page_feed.timeline import SeenHost, Timeline
from moesaic.cluster.reports.report import HostState

UP = SeenHost(state=HostState.UP, incarnation=1)


def told(line: Timeline, since: int = 0) -> list[str]:
    return [f"{one.get('host', '')} {one['what']}".strip() for one in line.events[since:]]


def test_what_there_is_at_first_is_no_event() -> None:
    line = Timeline()
    line.note(1.0, {"h": UP}, asleep={"m"})
    assert line.events == []
    line.note(2.0, {"h": UP}, asleep={"m"})
    assert line.events == []


def test_a_host_that_dies_and_comes_back() -> None:
    line = Timeline()
    line.note(1.0, {"h": UP})
    line.note(2.0, {"h": SeenHost(state=HostState.RESTARTING, incarnation=None)})
    line.note(3.0, {"h": SeenHost(state=HostState.RESTARTING, incarnation=None)})
    line.note(4.0, {"h": SeenHost(state=HostState.LOADING, incarnation=2)})
    line.note(5.0, {"h": SeenHost(state=HostState.UP, incarnation=2)})
    assert told(line) == ["h is restarting", "h is replaced by a new process"]
    assert [(one["at"], one["level"]) for one in line.events] == [(2.0, "bad"), (4.0, "good")]


def test_a_death_between_two_looks_is_seen_by_the_new_process() -> None:
    line = Timeline()
    line.note(1.0, {"h": UP})
    line.note(2.0, {"h": SeenHost(state=HostState.UP, incarnation=2)})
    assert told(line) == ["h is replaced by a new process"]


def test_a_host_that_is_frozen_and_answers_again() -> None:
    line = Timeline()
    line.note(1.0, {"h": UP})
    line.note(2.0, {"h": SeenHost(state=HostState.NOT_ANSWERING, incarnation=1)})
    line.note(3.0, {"h": UP})
    assert told(line) == ["h is not answering", "h answers again"]


def test_hosts_come_are_drained_and_leave() -> None:
    line = Timeline()
    line.note(1.0, {})
    line.note(2.0, {"h": SeenHost(state=HostState.STARTING, incarnation=None)})
    line.note(3.0, {"h": UP})
    line.note(4.0, {"h": SeenHost(state=HostState.UP, incarnation=1, draining=True)})
    line.note(5.0, {"h": UP})
    line.note(6.0, {})
    assert told(line) == [
        "h has joined",
        "h is being drained",
        "h is used again",
        "h has left the pool",
    ]


def test_models_runs_and_errors() -> None:
    line = Timeline()
    line.note(1.0, {})
    line.note(2.0, {}, asleep={"m"}, run="run 1")
    line.note(3.0, {}, error="boom", run="run 2")
    line.note(4.0, {}, error="boom")
    line.note(5.0, {})
    assert told(line) == [
        "model m falls asleep",
        "run 1 trains",
        "model m wakes up",
        "run 1 has ended",
        "run 2 trains",
        "the controller failed: boom",
        "run 2 has ended",
    ]


def test_only_the_last_events_are_kept() -> None:
    line = Timeline()
    line.note(0.0, {})
    for n in range(300):
        line.note(float(n), {f"h{n}": UP})
    assert len(line.events) == timeline_module._KEPT
    assert line.events[-1]["at"] == 299.0
