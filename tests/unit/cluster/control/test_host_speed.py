"""Hosts that are far slower than the others, or silent, are planned with the speed they have."""

from __future__ import annotations

import pytest

from moesaic.cluster.control.host_speed import HostSpeeds, Work, with_speed_factors
from moesaic.cluster.planner.plan import PoolHost

SPEEDS = {"a": 1.0, "b": 1.0, "c": 4.0}
TICK_S = 0.2


class World:
    """Hosts that are always busy: ten batches of 100 assignments a second, times their speeds."""

    def __init__(self) -> None:
        self.speeds = HostSpeeds()
        self.now = 0.0
        self.batches = dict.fromkeys(SPEEDS, 0.0)
        self.done = dict.fromkeys(SPEEDS, Work(0, 0, 0.0))
        self.incarnations = dict.fromkeys(SPEEDS, 1)

    def work(self, seconds: float, *, assignments: int = 100, **parts: float) -> dict[str, float]:
        """``speed_factors``: of its speed that a host has, 0 for one that gets nothing to do."""
        found = {}
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            for host, speed in SPEEDS.items():
                part = parts.get(host, 1.0)
                was = self.done[host]
                self.batches[host] += 10 * TICK_S * part
                new = int(self.batches[host]) - was.batches
                if new:
                    did, busy_s = int(new * assignments * speed), new * 0.1 / part
                    self.done[host] = Work(
                        was.batches + new, was.assignments + did, was.busy_s + busy_s
                    )
                self.speeds.note(host, self.incarnations[host], self.done[host], self.now)
            found = self.speeds.speed_factors(SPEEDS, ())
        return found


def test_hosts_that_differ_a_little_are_not_slow() -> None:
    assert World().work(20, a=0.6, b=1.3) == {}


def test_a_host_with_a_quarter_of_the_speed_is_not_slow_for_that() -> None:
    assert World().work(20) == {}


def test_a_slow_host_is_known_within_seconds_and_so_is_that_it_is_well_again() -> None:
    world = World()
    world.work(60)
    assert world.work(4, b=0.1).keys() == {"b"}
    assert world.work(20, b=0.1) == {"b": pytest.approx(0.1, rel=0.5)}
    assert world.work(2) == {}


def test_one_that_hardly_gets_calls_any_more_is_known_all_the_same() -> None:
    world = World()
    world.work(60)
    for _ in range(2):
        world.work(2, b=0.1)
        world.work(5, b=0)
    world.work(2, b=0.1)
    assert world.work(5, b=0) == {"b": pytest.approx(0.1, rel=0.5)}


def test_what_is_said_stands_until_it_is_wrong_by_half() -> None:
    world = World()
    said = world.work(5, b=0.2)
    assert said == {"b": pytest.approx(0.2, rel=0.5)}
    wobbling = [world.work(5, b=part * said["b"]) for part in (0.8, 1.3)]
    assert wobbling == [said, said]
    assert world.work(9, b=0.05) == {"b": pytest.approx(0.05, rel=0.5)}
    # Above what makes a host slow, and not yet well.
    assert world.work(9, b=0.4) == {"b": pytest.approx(0.4, rel=0.5)}
    assert World().work(9, b=0.4) == {}


def test_hosts_are_compared_over_the_same_seconds() -> None:
    world = World()
    world.work(10, assignments=10)
    # Calls become ten times as large, and b gets none of them for a while.
    assert world.work(5, b=0) == {}
    assert world.work(5) == {}


def test_nothing_is_said_of_little_work_of_one_host_alone_or_of_long_ago() -> None:
    assert World().work(2, b=0.1) == {}
    world = World()
    assert world.work(20, a=0, b=0.1, c=0) == {}
    world = World()
    assert world.work(10, b=0.1)
    assert world.work(80, b=0) == {}


def test_a_new_incarnation_begins_anew() -> None:
    world = World()
    assert world.work(10, b=0.1)
    world.incarnations["b"] += 1
    world.done["b"] = Work(0, 0, 0.0)
    assert world.work(0.2) == {}
    assert world.work(10) == {}


def test_a_silent_host_has_next_to_no_speed_unless_all_are_silent() -> None:
    world = World()
    world.work(10, b=0.1)
    assert world.speeds.speed_factors(SPEEDS, {"a"}) == {
        "a": 1e-6,
        "b": pytest.approx(0.1, rel=0.5),
    }
    assert world.speeds.speed_factors(SPEEDS, {"b"}) == {"b": 1e-6}
    assert world.speeds.speed_factors(SPEEDS, set(SPEEDS)) == {"b": pytest.approx(0.1, rel=0.5)}
    world.speeds.forget("b")
    assert world.speeds.speed_factors(SPEEDS, ()) == {}


def test_speeds_of_those_that_are_named_are_changed() -> None:
    hosts = [PoolHost(name=name, speed=speed) for name, speed in SPEEDS.items()]
    assert [host.speed for host in with_speed_factors(hosts, {"b": 0.1})] == [1.0, 0.1, 4.0]
