"""A host that is far slower than the others is planned with the speed that it has."""

from __future__ import annotations

from moesaic.cluster.paces import Paces
from moesaic.cluster.plan import PoolHost

SPEEDS = {"a": 1.0, "b": 1.0, "c": 4.0}


def heard(**busy_s: float) -> Paces:
    """Hosts that computed 1,000 choices of 100 calls in so many seconds."""
    paces = Paces()
    for host, seconds in busy_s.items():
        paces.hear(host, 100, 1000, seconds)
    return paces


def test_hosts_that_differ_a_little_are_not_slow() -> None:
    assert heard(a=1.0, b=2.0, c=0.25).slowness(SPEEDS) == {}


def test_a_slow_host_has_its_part_of_the_others_pace() -> None:
    assert heard(a=1.0, b=10.0, c=0.25).slowness(SPEEDS) == {"b": 0.1}


def test_a_host_with_half_the_speed_is_not_slow_for_that() -> None:
    assert heard(a=4.0, b=4.0, c=1.0).slowness(SPEEDS) == {}


def test_nothing_is_said_of_hosts_with_few_answers_or_alone() -> None:
    paces = heard(a=1.0, c=0.25)
    paces.hear("b", 5, 50, 10.0)
    assert paces.slowness(SPEEDS) == {}
    assert heard(b=10.0).slowness(SPEEDS) == {}


def test_what_was_long_ago_does_not_count() -> None:
    paces = heard(a=1.0, b=10.0, c=0.25)
    for _ in range(10):
        paces.advance(60.0)
    assert paces.slowness(SPEEDS) == {}


def test_speeds_of_slow_hosts_alone_are_changed() -> None:
    hosts = [PoolHost(name=name, speed=speed) for name, speed in SPEEDS.items()]
    slowed = heard(a=1.0, b=10.0, c=0.25).slowed(hosts)
    assert [host.speed for host in slowed] == [1.0, 0.1, 4.0]
