"""`/readyz` on real processes that are frozen, killed and full: right both ways, in stated seconds.

Not ready: within 12 s (`STALLED_S`, and an engine that answered a question just before). Ready
again: within 5 s of the first step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from moesaic import Client
from moesaic.actors.endpoint.http.health import HEAR_S
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.actors.runtime.ray_border import controller_of, namespace_of
from moesaic.actors.serve import trunk_apps
from moesaic.cluster.service.progress import STALLED_S
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError, EngineError, MoesaicError
from tests.helpers.endpoint.scripted import COUNT, SLOWLY, WAIT, scripted_engine
from tests.helpers.paths import ROOT
from tests.helpers.processes.frozen import freeze
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    running,
    text_in_background,
    text_of,
    wait_until,
)
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.slow]

MODEL = "m"
GOES_S = STALLED_S + HEAR_S
COMES_S = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@contextmanager
def scripted(name: str, folder: Path, **spec: Any) -> Iterator[Cluster]:
    with ExitStack() as last_first:
        # Only while it starts: other tests have clusters with real engines meanwhile.
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            patched.setattr(trunk_apps, "EngineFactory", lambda config: scripted_engine)
            hosts = [{"count": 1, "threads": 1}]
            cluster = last_first.enter_context(running(name, folder, hosts=hosts, **spec))
        yield cluster


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with scripted("ready", folder) as cluster:
        yield cluster


def trunks(cluster: Cluster) -> list[psutil.Process]:
    return [
        process
        for process in started_processes()
        if f"::ServeReplica:moesaic-{cluster.name}:m:Trunk" in " ".join(process.cmdline())
    ]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ready(cluster: Cluster, model: str | None = MODEL) -> bool:
    params = {} if model is None else {"model": model}
    with httpx.Client(trust_env=False, timeout=2.0) as http:
        return http.get(f"{cluster.url}/readyz", params=params).status_code == 200


def seconds_until(cluster: Cluster, wanted: bool, most_s: float) -> float:
    began = time.monotonic()
    while ready(cluster) != wanted:
        assert time.monotonic() - began < most_s, f"still {not wanted} after {most_s} s"
        time.sleep(0.1)
    return time.monotonic() - began


def stays_ready(cluster: Cluster, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert ready(cluster)
        assert ready(cluster, None)
        time.sleep(0.2)


@contextmanager
def asking(cluster: Cluster, what: int, count: int, tokens: int = 300) -> Iterator[list[str]]:
    """So many streams; the errors that ended some."""
    errors: list[str] = []
    leave = threading.Event()

    def ask() -> None:
        with Client(cluster.url or "", retries=0) as client:
            try:
                for _ in client.stream_complete([what], model=MODEL, max_tokens=tokens):
                    if leave.is_set():
                        return
            except MoesaicError as error:
                errors.append(error.code)

    with ThreadPoolExecutor(count) as threads:
        for _ in range(count):
            threads.submit(ask)
        try:
            yield errors
        finally:
            leave.set()


def test_a_frozen_trunk_is_not_ready_while_work_waits(cluster: Cluster) -> None:
    (trunk,) = trunks(cluster)
    with asking(cluster, SLOWLY, 2, 60):
        time.sleep(2.0)
        assert ready(cluster)
        with frozen(trunk.pid):
            assert seconds_until(cluster, False, GOES_S) > STALLED_S / 2
            with httpx.Client(trust_env=False, timeout=2.0) as http:
                assert http.get(f"{cluster.url}/livez").status_code == 200
                assert http.get(f"{cluster.url}/startupz").status_code == 200
            # Also when whoever waited has been told that it is gone.
            time.sleep(12.0)
            assert not ready(cluster)
        seconds_until(cluster, True, COMES_S)


def test_a_trunk_that_freezes_in_its_sleep_is_found_by_probes(cluster: Cluster) -> None:
    (trunk,) = trunks(cluster)
    stays_ready(cluster, GOES_S + 2.0)
    with frozen(trunk.pid):
        assert seconds_until(cluster, False, GOES_S) > STALLED_S / 2
        with ThreadPoolExecutor(1) as threads, Client(cluster.url or "", retries=0) as client:
            asked = threads.submit(client.complete, [COUNT], model=MODEL, max_tokens=2)
            os.kill(trunk.pid, signal.SIGCONT)
            seconds_until(cluster, True, COMES_S)
            assert asked.result(30).usage.completion_tokens == 2


def test_a_full_trunk_is_ready(cluster: Cluster) -> None:
    with asking(cluster, WAIT, 60), asking(cluster, SLOWLY, 1, 100) as errors:
        stays_ready(cluster, GOES_S + 5.0)
        assert errors == []
        for trunk in trunks(cluster):
            trunk.kill()
    wait_until(lambda: len(trunks(cluster)) == 1)


def test_a_killed_trunk_with_work_is_not_ready_until_another_is_there(cluster: Cluster) -> None:
    (trunk,) = trunks(cluster)
    (raylet,) = [one for one in started_processes() if one.name() == "raylet"]
    with asking(cluster, SLOWLY, 2) as errors:
        time.sleep(2.0)
        # No other one can start meanwhile.
        with frozen(raylet.pid):
            trunk.kill()
            seconds_until(cluster, False, GOES_S + 1.0)
        wait_until(lambda: len(trunks(cluster)) == 1)
        seconds_until(cluster, True, 60.0)
    assert set(errors) <= {EngineError.__name__}
    with Client(cluster.url or "") as client:
        assert client.complete([COUNT], model=MODEL, max_tokens=2).usage.completion_tokens == 2
    assert ready(cluster)


def test_the_controller_says_nothing_of_it(cluster: Cluster) -> None:
    namespace = namespace_of(cluster.name)
    found = [one for one in started_processes() if "::Controller" in " ".join(one.cmdline())]
    (controller,) = found
    with frozen(controller.pid), asking(cluster, SLOWLY, 1, 100):
        stays_ready(cluster, GOES_S)
        with Client(cluster.url or "") as client:
            assert client.complete([COUNT], model=MODEL, max_tokens=2).usage.completion_tokens == 2
    ray.kill(controller_of(namespace), no_restart=False)
    stays_ready(cluster, 5.0)

    def is_back() -> bool:
        try:
            return bool(cluster.status().hosts)
        except ClusterError:
            return False  # being started anew

    wait_until(is_back)


def test_hosts_that_die_and_freeze_are_replaced_and_nobody_is_told(folder: Path) -> None:
    with (
        running(
            "hosts",
            folder,
            models=[{"name": MODEL, "path": str(folder), "replicas": 2}],
            hosts=[{"count": 2, "threads": 1}],
        ) as cluster,
        Client(cluster.url or "") as client,
    ):
        wanted = text_of(client, MODEL, 400)
        with text_in_background(client, MODEL, 400) as result:
            with frozen(processes_of(cluster)["host-0"].pid):
                stays_ready(cluster, 5.0)
                assert text_of(client, MODEL, 400) == wanted
                stays_ready(cluster, GOES_S)
            assert result() == wanted
        with text_in_background(client, MODEL, 400) as result:
            os.kill(processes_of(cluster)["host-1"].pid, signal.SIGKILL)
            stays_ready(cluster, 5.0)
            assert result() == wanted


def test_one_trunk_of_two_is_enough(folder: Path) -> None:
    trunk = {"cache_tokens": 1024, "threads": 1, "min_replicas": 2, "max_replicas": 2}
    with scripted("two", folder, trunk=trunk) as cluster:
        wait_until(lambda: len(trunks(cluster)) == 2)
        first, second = trunks(cluster)
        with asking(cluster, SLOWLY, 4, 60):
            time.sleep(2.0)
            with frozen(first.pid):
                stays_ready(cluster, GOES_S + 2.0)
                with frozen(second.pid):
                    seconds_until(cluster, False, GOES_S)
                seconds_until(cluster, True, COMES_S)
