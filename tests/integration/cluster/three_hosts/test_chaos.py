"""What `docs/failures.md` promises of processes: each is killed, frozen or slowed while a stream
runs. The pool has `redundancy: 1`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.cluster.reports.status import MissingExpert
from moesaic.handle import Cluster
from moesaic.proto.errors import EngineError, MoesaicError
from tests.helpers.processes.frozen import freeze
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    replicas_of,
    text_in_background,
    text_of,
    wait_until,
    wait_whole,
)

MODEL = "m"
TOKENS = 150

pytestmark = ON_RAY


def trunk_process() -> psutil.Process:
    """Of this test's own cluster: a child of its Ray."""
    (found,) = [
        process
        for process in started_processes()
        if "ServeReplica" in process.name() + " ".join(process.cmdline())
        and "Trunk" in " ".join(process.cmdline())
    ]
    return found


@contextmanager
def slowed(pid: int, run_s: float = 0.01, stand_s: float = 0.09) -> Iterator[None]:
    """The process runs a tenth of the time."""
    over = threading.Event()

    def tease() -> None:
        while not over.is_set():
            freeze(pid)
            over.wait(stand_s)
            os.kill(pid, signal.SIGCONT)
            over.wait(run_s)

    thread = threading.Thread(target=tease)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
        os.kill(pid, signal.SIGCONT)


def test_nothing_waits_for_a_reload_and_redundancy_comes_back(
    pool: Cluster, client: Client
) -> None:
    expected = text_of(client, MODEL, TOKENS)
    assert pool.status().unprotected_experts == 0
    victim = processes_of(pool)["host-1"]
    with text_in_background(client, MODEL, TOKENS) as result:
        os.kill(victim.pid, signal.SIGKILL)
        missing: list[MissingExpert] = []

        def noticed() -> bool:
            status = pool.status()
            missing.extend(status.missing_examples)
            return status.unprotected_experts > 0

        wait_until(noticed)
        assert not missing, "every expert has another replica"
        assert result() == expected
    wait_until(lambda: pool.status().unprotected_experts == 0)
    assert pool.status().missing_experts == 0


def test_a_slow_host_changes_no_token(pool: Cluster, client: Client) -> None:
    expected = text_of(client, MODEL, TOKENS)
    with slowed(processes_of(pool)["host-0"].pid):
        assert text_of(client, MODEL, TOKENS) == expected
    assert text_of(client, MODEL, TOKENS) == expected


def test_a_router_that_wakes_late_finds_its_way(pool: Cluster, client: Client) -> None:
    """It slept beyond its lease: experts that its placement names were let go of meanwhile."""
    expected = text_of(client, MODEL, TOKENS)
    trunk = trunk_process()
    with text_in_background(client, MODEL, TOKENS) as result:
        trunk.suspend()
        try:
            pool.drain("host-2")
            wait_until(lambda: replicas_of(pool)["host-2"] == 0)
        finally:
            trunk.resume()
        assert result() == expected
    pool.undrain("host-2")
    wait_whole(pool)


def test_a_resumable_stream_goes_on_behind_a_killed_trunk(pool: Cluster, client: Client) -> None:
    expected = text_of(client, MODEL, 200)
    trunk = trunk_process()
    with text_in_background(client, MODEL, 200, moesaic={"resumable": True}) as result:
        trunk.kill()
        assert result() == expected


@pytest.mark.slow
def test_a_killed_trunk_ends_its_streams_with_an_error_that_says_try_again(
    pool: Cluster, client: Client
) -> None:
    expected = text_of(client, MODEL, TOKENS)
    trunk = trunk_process()
    with text_in_background(client, MODEL, 400) as result:
        trunk.kill()
        with pytest.raises(EngineError) as raised:
            result()
    assert raised.value.retryable

    def answers() -> bool:
        try:
            return text_of(client, MODEL, TOKENS) == expected
        except MoesaicError as error:
            assert error.retryable, error
            return False

    wait_until(answers)
