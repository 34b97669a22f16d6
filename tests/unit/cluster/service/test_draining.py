"""How long an ending waits, and for what; what signals do to the process that owns a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.controller import host_provisioner as provisioner
from moesaic.actors.controller.host_provisioner import end_hosts
from moesaic.cli.ending import INTERRUPTED, EndSignals
from moesaic.cluster.service.draining import FLUSH_S, GRACE_S, SILENT_S, Draining
from moesaic.handle import Cluster
from moesaic.session import ClusterSession


def draining(drain_s: float = 30.0) -> Draining:
    found = Draining(drain_s, 0.0)
    found.expect("the endpoint", "answer", 0.0)
    found.expect("the router service", "call", 0.0)
    return found


def test_nothing_runs_and_nothing_is_waited_for() -> None:
    assert not Draining(30.0, 0.0).waits(0.0)
    one = draining()
    one.heard("the endpoint", 0, 0.1)
    assert not one.waits(0.1)
    assert one.news(0.1) is None


def test_what_runs_is_waited_for_and_told_of() -> None:
    one = draining()
    one.heard("the endpoint", 3, 0.0)
    assert one.news(0.0) == "ending: 3 answers are still running, at most 30 s"
    assert one.news(0.5) is None
    one.heard("the router service", 1, 1.0)
    assert one.news(1.0) == "ending: 3 answers and 1 call are still running, at most 29 s"
    one.heard("the endpoint", 2, 1.1)
    assert one.news(1.1) is None  # not more than one line a second
    one.heard("the endpoint", 0, 2.0)
    assert one.news(2.1) == "ending: 1 call is still running, at most 28 s"
    one.heard("the router service", 0, 9.0)
    assert one.news(9.0) == "ending: nothing is running any more"
    # Serve's proxy hands the end of the last one on.
    assert one.waits(9.0)
    assert not one.waits(9.0 + FLUSH_S)


def test_what_is_silent_is_not_waited_for() -> None:
    one = draining()
    one.heard("the endpoint", 3, 0.0)
    one.heard("the router service", 1, 0.0)
    one.heard("the router service", 1, SILENT_S)
    assert one.waits(SILENT_S + 0.1)
    assert one.parts == ["the router service"]
    assert not one.waits(2 * SILENT_S + 0.1)


@given(
    drain_s=st.floats(0.0, 100.0),
    steps=st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(0, 3)), max_size=60),
)
def test_it_ends_in_its_time_whatever_is_heard(
    drain_s: float, steps: list[tuple[float, int]]
) -> None:
    one, now = draining(drain_s), 0.0
    for seconds, running in steps:
        now += seconds
        if "the endpoint" in one.parts:
            one.heard("the endpoint", running, now)
        waits = one.waits(now)
        assert waits <= (now <= drain_s + GRACE_S)
        if running and now <= drain_s + GRACE_S and "the endpoint" in one.parts:
            assert waits


# ---- one exception skips nothing -----------------------------------------------------------------


def test_a_host_that_cannot_be_ended_keeps_no_other_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    def kill(host: Mock, *, no_restart: bool) -> None:
        killed.append(host.name)
        if host.name == "b":
            raise RuntimeError("no answer")

    def wait(left: list[str], *, num_returns: int, timeout: float) -> None:
        assert left == ["left"] * num_returns
        assert timeout > 0
        assert killed == [], "they leave before they are killed"

    hosts = {name: Mock(**{"leave.remote.return_value": "left"}) for name in "abc"}
    for name, host in hosts.items():
        host.name = name
    monkeypatch.setattr(provisioner.ray, "kill", kill)
    monkeypatch.setattr(provisioner.ray, "wait", wait)
    monkeypatch.setattr(provisioner.ray, "get_actor", lambda name, namespace: hosts[name])
    with pytest.raises(RuntimeError, match="no answer"):
        end_hosts("n", "abc")
    assert sorted(killed) == ["a", "b", "c"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_trunk_that_does_not_close_keeps_nothing_else_running(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    ended: list[str] = []

    class Part:
        def __init__(self, name: str) -> None:
            self._name = name

        def close(self, *_: object) -> None:
            ended.append(self._name)
            if self._name == "trunk-1":
                raise error("it does not")

    monkeypatch.setattr(Cluster, "_end", lambda *_: ended.append("cluster"))
    cluster = Cluster(ClusterSession(name="c", pid=os.getpid(), started=0.0, ray_address=""))
    trunks: Any = cluster._trunks
    trunks += [Part("trunk-0"), Part("trunk-1"), Part("trunk-2")]
    with pytest.raises(error):
        cluster.down()
    assert ended == ["trunk-2", "trunk-1", "trunk-0", "cluster"]


# ---- signals -------------------------------------------------------------------------------------


class Left(Exception):
    pass


@pytest.fixture
def ends() -> Iterator[tuple[EndSignals, list[Any]]]:
    done: list[Any] = []
    with EndSignals(lambda: done.append("ended"), leave=done.append) as ends:
        yield ends, done


def wait_for(done: list[Any], wanted: list[Any]) -> None:
    deadline = time.monotonic() + 10
    while done != wanted:
        assert time.monotonic() < deadline, done
        time.sleep(0.01)


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_interrupts_a_start(
    ends: tuple[EndSignals, list[Any]], one: signal.Signals
) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), one)
        time.sleep(10)
    assert ends[0].asked.wait(5)
    assert ends[1] == []


def test_the_first_signal_only_asks_a_cluster_that_runs(ends: tuple[EndSignals, list[Any]]) -> None:
    ends[0].only_ask()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ends[0].asked.wait(5)
    assert ends[1] == []


def test_the_second_signal_ends_at_once_whatever_the_main_thread_does(
    ends: tuple[EndSignals, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.cli.ending.AT_ONCE_S", 0.05)
    ends[0].only_ask()
    os.kill(os.getpid(), signal.SIGINT)
    assert ends[0].asked.wait(5)
    # As Ray does it when it is initialised.
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(ends[1], ["ended", INTERRUPTED])


def test_what_cannot_be_ended_at_once_keeps_the_process_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moesaic.cli.ending.AT_ONCE_S", 0.05)
    left: list[Any] = []
    forever = threading.Event()

    def hangs() -> None:
        forever.wait()

    with EndSignals(hangs, leave=left.append) as ends:
        ends.only_ask()
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert ends.asked.wait(5)
        wait_for(left, [INTERRUPTED])
    forever.set()


def test_handlers_are_what_they_were() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with EndSignals(lambda: None):
        pass
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_late_signal_does_not_change_the_exit_code() -> None:
    late = """
import atexit, os, signal
from moesaic.cli.ending import exit_with
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
exit_with(3)
"""
    assert subprocess.run([sys.executable, "-c", late], check=False, timeout=60).returncode == 3


class Swallows:
    """Python ignores what a handler raises while a destructor runs."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_lost_comes_with_the_next_step(
    ends: tuple[EndSignals, list[Any]],
) -> None:
    ends[0].check()
    victim = Swallows()
    del victim
    assert ends[0].asked.wait(5)
    with pytest.raises(KeyboardInterrupt):
        ends[0].check()
    ends[0].only_ask()
    ends[0].check()
