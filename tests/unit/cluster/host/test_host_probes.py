"""Which hosts are ready, by the probes of their listeners; times are those of a test's clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.host.probes import LISTED, LOOK_S, PROBE_S, HostProbes
from moesaic.cluster.host_answers import HostAnswers
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.reports.report import HostState
from tests.helpers.cluster.worlds import entry

UP = HostState.UP
WELL = HostAnswers(startup=True, liveness=True, readiness=True)
ONE = entry("h0")


class Pool:
    """A controller that looks once a second at hosts that answer at once, or not at all."""

    def __init__(self, *hosts: HostEntry) -> None:
        self.now = 0.0
        self.probes = HostProbes()
        self.hosts = list(hosts)
        self.frozen: set[str] = set()
        self.asked: list[str] = []

    def look(self, seconds: float = 0.0) -> None:
        until = self.now + seconds
        while True:
            for host in self.probes.due(self.hosts, self.now):
                self.asked.append(host.host)
                if host.host in self.frozen:
                    self.probes.failed(host, "no answer", self.now)
                else:
                    self.probes.answered(host, WELL, self.now)
            if self.now >= until:
                return
            self.now += LOOK_S

    def obstacle(self, host: HostEntry = ONE, state: HostState = UP) -> str | None:
        return self.probes.obstacle(state, host, self.now)


def test_a_new_host_is_ready_once_it_was_probed_and_not_before() -> None:
    pool = Pool(ONE)
    assert "has not answered yet" in (pool.obstacle() or "")
    assert not pool.probes.reached(ONE)
    pool.look()
    assert pool.obstacle() is None
    assert pool.probes.reached(ONE)


def test_a_host_that_nobody_lists_is_not_ready_whatever_its_listener_says() -> None:
    pool = Pool(ONE)
    pool.look()
    for state in LISTED:
        assert pool.obstacle(state=state) is None
    for state in set(HostState) - set(LISTED):
        assert pool.obstacle(state=state) == f"it is {state.words}"
    assert pool.probes.obstacle(HostState.STARTING, None, pool.now) == "it is starting"


def test_a_frozen_host_is_unready_within_the_stated_time_and_ready_again_after() -> None:
    pool = Pool(ONE)
    pool.look(10)
    pool.frozen.add("h0")
    froze_at = pool.now
    while pool.obstacle() is None:
        pool.look(LOOK_S)
    assert pool.now - froze_at <= pool.probes.recent_s == 3 * PROBE_S
    assert "has not answered for 6 s (no answer)" in (pool.obstacle() or "")
    pool.look(60)
    assert pool.obstacle() is not None
    pool.frozen.clear()
    thawed_at = pool.now
    while pool.obstacle() is not None:
        pool.look(LOOK_S)
    assert pool.now - thawed_at <= PROBE_S


def test_one_lost_probe_says_nothing() -> None:
    pool = Pool(ONE)
    pool.look(2)
    pool.frozen.add("h0")
    pool.look(PROBE_S)
    assert pool.obstacle() is None


def test_another_start_of_a_host_is_another_host() -> None:
    pool, next_one = Pool(ONE), entry("h0", incarnation=2)
    pool.look(4)
    assert not pool.probes.reached(next_one)
    assert "has not answered yet" in (pool.obstacle(next_one) or "")
    pool.frozen.add("h0")
    pool.hosts = [next_one]
    pool.look()
    assert "has not answered yet (no answer)" in (pool.obstacle(next_one) or "")
    assert not pool.probes.reached(ONE)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (HostAnswers(startup=True, liveness=False, readiness=False), "loop does not turn"),
        (HostAnswers(startup=True, liveness=True, readiness=False), "says that it is not ready"),
    ],
)
def test_what_a_host_says_of_itself_counts(answers: HostAnswers, said: str) -> None:
    pool = Pool(ONE)
    pool.probes.answered(ONE, answers, pool.now)
    assert said in (pool.obstacle() or "")
    assert pool.probes.reached(ONE)  # its listener did answer


def test_a_controller_that_was_frozen_calls_nobody_unready() -> None:
    pool = Pool(ONE)
    pool.look(10)
    pool.now += 600.0  # nobody looked
    assert pool.obstacle() is None
    pool.frozen.add("h0")
    pool.look(10)
    assert pool.obstacle() is not None


def test_failures_are_news_once() -> None:
    probes = HostProbes()
    assert probes.failed(ONE, "no", 0.0)
    assert not probes.failed(ONE, "no", 1.0)
    probes.answered(ONE, WELL, 2.0)
    assert probes.failed(ONE, "no", 3.0)


def test_a_host_that_has_left_is_forgotten() -> None:
    pool = Pool(ONE)
    pool.look()
    pool.hosts = []
    pool.look()
    assert not pool.probes.reached(ONE)


@given(st.integers(1, 300))
def test_every_host_of_a_large_pool_is_probed_often_enough_to_stay_ready(count: int) -> None:
    pool = Pool(*(entry(f"h{n}") for n in range(count)))
    pool.look(2 * pool.probes.recent_s + count / 10)
    for _ in range(int(pool.probes.recent_s) + 1):
        pool.asked.clear()
        pool.look()
        assert len(pool.asked) <= 25
        assert all(pool.obstacle(host) is None for host in pool.hosts)
        pool.now += LOOK_S
