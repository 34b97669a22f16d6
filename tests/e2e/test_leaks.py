"""Rounds of up, request, kill, down leave nothing behind."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

import moesaic
from moesaic import Client
from moesaic.session import session_dir
from tests.helpers.shared_memory import in_shared_memory
from tests.integration.conftest import save_model

pytestmark = [
    pytest.mark.alone,
    # Ray leaves sockets and log files to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]


def leftovers() -> dict[str, set[str]]:
    """Everything that a cluster of this process could leave.

    Sockets and memfds have no names in a file system: they end with the processes that hold them.
    """
    return {
        "processes": {
            f"{p.pid} {' '.join(p.cmdline())[:80]}"
            for p in psutil.Process().children(recursive=True)
            if p.status() != psutil.STATUS_ZOMBIE
        },
        "shared memory": in_shared_memory(),
        "listening": {
            f"{c.laddr}" for c in psutil.Process().net_connections() if c.status == "LISTEN"
        },
        "sessions": {file.name for file in session_dir().glob(f"leak{os.getpid()}.json")},
    }


def open_files() -> Counter[str]:
    links: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links[str(fd.readlink())] += 1
        except FileNotFoundError:
            continue
    return links


def one_round(folder: Path) -> None:
    spec = {
        "name": f"leak{os.getpid()}",
        "models": [{"name": "m", "path": str(folder), "replicas": 2}],
        "hosts": [{"count": 2}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "router": {"port": 0},
    }
    with moesaic.up(spec) as cluster, Client(cluster.url or "") as client:
        before = client.complete("the quick fox", max_tokens=8, temperature=0)
        assert before.usage.completion_tokens == 8
        os.kill(cluster.status().processes["host-0"].pid, signal.SIGKILL)
        after = client.complete("the quick fox", max_tokens=8, temperature=0)
        assert after.text == before.text


def settled(before: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is more than before, once dying processes have had their time."""
    deadline = time.monotonic() + 20
    while True:
        more = {kind: found - before[kind] for kind, found in leftovers().items()}
        if not any(more.values()) or time.monotonic() > deadline:
            return more
        time.sleep(0.2)


@pytest.mark.timeout(300)
def test_a_round_leaves_nothing(tmp_path: Path) -> None:
    save_model(tmp_path, "mixtral")
    before = leftovers()
    one_round(tmp_path)
    assert not any(settled(before).values()), settled(before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_rounds_leave_nothing(tmp_path: Path) -> None:
    rounds = 20
    save_model(tmp_path, "mixtral")
    # The first round opens what Ray keeps for the life of a process.
    one_round(tmp_path)
    before, files = leftovers(), open_files()
    for _ in range(rounds):
        one_round(tmp_path)
        assert not any(settled(before).values()), settled(before)
    more = open_files() - files
    sockets = Counter(file for file in more.elements() if file.startswith("socket:"))
    logs = Counter(file for file in more.elements() if "/session_" in file)
    assert more == sockets + logs
    # ray.init and ray.shutdown alone leave up to two closed sockets each in their process.
    assert sockets.total() <= 2 * rounds
    assert logs.total() <= 1, "the log file of the last Ray, in place of the first one's"
