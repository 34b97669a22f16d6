"""Simulated processes that are frozen and woken."""

from __future__ import annotations

from moesaic.actors.simulator.clock import Clock, SimProcess


def run(clock: Clock, events: int) -> None:
    for _ in range(events):
        clock.next().act()


def test_what_a_process_kept_comes_before_what_reaches_it_as_it_is_woken() -> None:
    clock, heard = Clock(), list[str]()
    process = SimProcess("p", clock)
    process.freeze()
    for name in ("first", "second", "third"):
        process.reach(1.0, name, lambda name=name: heard.append(name))
    run(clock, 2)
    process.wake()
    run(clock, 4)
    assert heard == ["first", "second", "third"]


def test_a_process_that_is_frozen_again_keeps_the_rest() -> None:
    clock, heard = Clock(), list[str]()
    process = SimProcess("p", clock)
    process.freeze()
    for name in ("first", "second"):
        process.reach(1.0, name, lambda name=name: heard.append(name))
    run(clock, 2)
    process.wake()
    run(clock, 1)
    process.freeze()
    run(clock, 1)
    assert heard == ["first"]
    process.wake()
    run(clock, 1)
    assert heard == ["first", "second"]
