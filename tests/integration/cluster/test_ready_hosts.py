"""Hosts on Ray that freeze, start slowly, or are new and idle: `status` says who is ready.

Not ready: within 6 s of a host's last answer. Ready again: within 5 s. Nothing here measures that
time, since other tests share the machine; `tests/unit/cluster/host/test_host_probes.py` does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.actors.runtime.ray_border import controller_of, namespace_of
from moesaic.actors.serve import beginning
from moesaic.cluster.reports.status import HostStatus
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError
from tests.helpers.paths import ROOT
from tests.helpers.processes.deaf import UNREACHED, WalledController
from tests.helpers.processes.frozen import freeze
from tests.helpers.processes.live import (
    ON_RAY,
    hosts_of,
    processes_of,
    running,
    text_of,
    wait_until,
)
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.slow]

MODEL = "m"


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walls")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, walls: Path) -> Iterator[Cluster]:
    model = save_model(tmp_path_factory.mktemp("model"), "mixtral")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patched.setenv(UNREACHED, str(walls))
        patched.setattr(beginning, "Controller", WalledController)
        hosts = [{"count": 2, "min_count": 2, "max_count": 3, "threads": 1}]
        models = [{"name": MODEL, "path": str(model), "replicas": 2}]
        with running(
            "readiness", model, hosts=hosts, models=models, balance={"lease_s": 2}
        ) as found:
            yield found


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def host_of(cluster: Cluster, name: str) -> HostStatus:
    return hosts_of(cluster)[name]


def unready(cluster: Cluster) -> dict[str, str | None]:
    return {h.name: h.unready_reason for h in cluster.status().hosts if not h.ready}


def wait_ready(cluster: Cluster) -> None:
    wait_until(lambda: not unready(cluster))


def process_named(part: str) -> psutil.Process | None:
    found = [one for one in started_processes() if part in " ".join(one.cmdline())]
    return found[0] if found else None


def test_a_host_with_experts_that_freezes(cluster: Cluster) -> None:
    wait_ready(cluster)
    with Client(cluster.url or "") as client:
        wanted = text_of(client, MODEL, 20)
        with frozen(processes_of(cluster)["host-0"].pid):
            wait_until(lambda: not host_of(cluster, "host-0").ready)
            # It alone, and requests go on.
            assert unready(cluster).keys() == {"host-0"}
            assert text_of(client, MODEL, 20) == wanted
        wait_ready(cluster)
        assert text_of(client, MODEL, 20) == wanted


def test_a_controller_that_was_frozen_calls_no_host_unready(cluster: Cluster) -> None:
    wait_ready(cluster)
    controller = process_named("::WalledController")
    assert controller is not None
    with frozen(controller.pid):
        time.sleep(12.0)
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        assert unready(cluster) == {}


def test_a_controller_that_starts_anew_finds_them_ready(cluster: Cluster) -> None:
    term = cluster.status().controller.term
    ray.kill(controller_of(namespace_of(cluster.name)), no_restart=False)

    def is_back() -> bool:
        try:
            return cluster.status().controller.term > term
        except ClusterError:
            return False  # being started anew

    wait_until(is_back)
    wait_ready(cluster)


def test_a_host_that_starts_slowly_and_idly_is_ready_when_it_was_probed(
    cluster: Cluster, walls: Path
) -> None:
    """It holds no expert before, and then is judged without any traffic."""
    wall = walls / "host-2"
    wall.touch()
    with ThreadPoolExecutor(1) as thread:
        scaled = thread.submit(cluster.scale, 3)
        wait_until(lambda: process_named("::RayExpertHost") is not None)
        wait_until(lambda: "host-2" in hosts_of(cluster))

        def has_started() -> bool:
            host = host_of(cluster, "host-2")
            assert not host.ready
            assert host.unready_reason
            return host.process is not None

        wait_until(has_started)
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            host = host_of(cluster, "host-2")
            assert host.process is not None
            assert (host.ready, host.process.replicas) == (False, 0)
            assert "no route" in (host.unready_reason or "")
            assert unready(cluster).keys() == {"host-2"}
        wall.unlink()
        wait_ready(cluster)
        assert scaled.result(120).phase == "done"


def test_an_idle_host_without_experts_that_freezes(cluster: Cluster) -> None:
    if len(hosts_of(cluster)) < 3:
        cluster.scale(3)
    wait_until(lambda: not cluster.drain("host-2", 60.0).remaining_replicas)
    wait_ready(cluster)
    host = host_of(cluster, "host-2")
    assert host.process is not None
    assert host.process.replicas == 0
    calls = host.process.calls
    with frozen(host.process.pid):
        wait_until(lambda: not host_of(cluster, "host-2").ready)
        assert unready(cluster).keys() == {"host-2"}
    wait_ready(cluster)
    host = host_of(cluster, "host-2")
    assert host.process is not None
    assert host.process.calls == calls


def test_a_host_that_is_killed_is_ready_when_its_next_process_was_probed(
    cluster: Cluster, walls: Path
) -> None:
    wait_ready(cluster)
    pid = processes_of(cluster)["host-0"].pid
    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        host = host_of(cluster, "host-0")
        if host.process is None or host.process.pid == pid:
            return False
        return bool(host.ready)

    wait_until(lambda: not host_of(cluster, "host-0").ready)
    wait_until(is_back)
