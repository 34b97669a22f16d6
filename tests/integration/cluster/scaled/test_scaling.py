"""Hosts come and go on real actors while streams run, whose texts never change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.actors.runtime.ray_border import CONTROLLER, namespace_of
from moesaic.cluster.reports.scaling import ScalingReport
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError
from tests.helpers.processes.live import (
    ON_RAY,
    asking,
    hosts_of,
    processes_of,
    replicas_of,
    term_of,
    text_of,
    wait_until,
)

MODEL = "m"
TOKENS = 60

pytestmark = ON_RAY


def test_two_to_four_to_two_under_load(pool: Cluster, client: Client) -> None:
    wanted = text_of(client, MODEL, TOKENS)
    with asking(client, MODEL, TOKENS, wanted) as wrong:
        up = pool.scale(4, timeout_s=60)
        assert (up.phase, up.arriving_hosts, up.leaving_hosts) == ("done", ["host-2", "host-3"], [])
        # New hosts are put to use by themselves.
        wait_until(lambda: min(replicas_of(pool).values()) > 0)
        pids = {name: process.pid for name, process in processes_of(pool).items()}
        down = pool.scale(2, timeout_s=60)
        assert down.phase == "done"
        assert len(down.leaving_hosts) == 2
        assert hosts_of(pool).keys() == pids.keys() - set(down.leaving_hosts)
        for name in down.leaving_hosts:
            wait_until(lambda name=name: not psutil.pid_exists(pids[name]))
    assert wrong == []
    assert text_of(client, MODEL, TOKENS) == wanted
    assert pool.scale(2).phase == "done"
    assert [one.target_hosts for one in pool.status().scaling.recent][-3:] == [4, 2, 2]


def test_what_cannot_be_is_refused_by_name(pool: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"count: 5; .* from 1 to 4, hosts\.0\.max_count"):
        pool.scale(5)
    with pytest.raises(ClusterError, match=r"group: 1 does not exist; .* groups 0 to 0"):
        pool.scale(1, group=1)


def test_the_command_line_scales(pool: Cluster) -> None:
    command = [sys.executable, "-m", "moesaic.cli.main", "scale", "3", "--name", pool.name]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["phase"] == "done"
    assert len(hosts_of(pool)) == 3
    pool.scale(2, timeout_s=60)


@pytest.mark.slow
def test_a_new_controller_knows_the_hosts_and_who_was_leaving(
    pool: Cluster, client: Client
) -> None:
    wanted = text_of(client, MODEL, TOKENS)
    pool.scale(4, timeout_s=60)
    wait_until(lambda: min(replicas_of(pool).values()) > 0)
    names = hosts_of(pool).keys()
    term = pool.status().controller.term
    # It begins to let two hosts go, and dies.
    asked: Any = ray.get_actor(CONTROLLER, namespace=namespace_of(pool.name))
    scaling: ScalingReport = ray.get(asked.scale.remote(2, 0, "test"), timeout=30)
    ray.kill(asked, no_restart=False)
    wait_until(lambda: term_of(pool) > term)
    wait_until(lambda: hosts_of(pool).keys() == names - set(scaling.leaving_hosts))
    assert text_of(client, MODEL, TOKENS) == wanted


@pytest.mark.slow
def test_a_host_that_dies_while_it_leaves_holds_nothing_up(pool: Cluster, client: Client) -> None:
    wanted = text_of(client, MODEL, TOKENS)
    pool.scale(3, timeout_s=60)
    controller: Any = ray.get_actor(CONTROLLER, namespace=namespace_of(pool.name))
    scaling: ScalingReport = ray.get(controller.scale.remote(2, 0, "test"), timeout=30)
    process = processes_of(pool).get(scaling.leaving_hosts[0])
    if process is not None:
        os.kill(process.pid, signal.SIGKILL)
    assert pool.scale(2, timeout_s=60).phase == "done"
    assert len(hosts_of(pool)) == 2
    assert text_of(client, MODEL, TOKENS) == wanted


def things_open() -> Counter[str]:
    """Processes below this one, and the shared memory and sockets of each trunk and controller."""
    found: Counter[str] = Counter()
    for process in started_processes():
        try:
            # Ray's titles name the method that runs just now, too.
            name = " ".join(process.cmdline())[:60].partition(".")[0].strip()
            found[f"process {name}"] += 1
            if "ServeReplica" in name or "Controller" in name:
                for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                    target = str(descriptor.readlink())
                    kind = "memfd" if "memfd:" in target else target.partition(":")[0]
                    if kind in ("memfd", "socket"):
                        found[f"{kind} of {name}"] += 1
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_up_directly_behind_down_twenty_times_leaks_nothing(pool: Cluster, client: Client) -> None:
    wanted = text_of(client, MODEL, TOKENS)

    def one_round() -> None:
        assert pool.scale(4, timeout_s=180).phase == "done"
        assert text_of(client, MODEL, 10) == wanted_short
        assert pool.scale(2, timeout_s=180).phase == "done"

    wanted_short = text_of(client, MODEL, 10)
    one_round()
    before = _settled(things_open())
    for _ in range(20):
        one_round()
    deadline = time.monotonic() + 30
    while things_open() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert things_open() - before == Counter()
    assert text_of(client, MODEL, TOKENS) == wanted


def _settled(found: Counter[str]) -> Counter[str]:
    """Once dying processes are gone: the same twice in a row."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(1.0)
        again = things_open()
        if again == found:
            return found
        found = again
    raise AssertionError(f"never quiet: {found}")
