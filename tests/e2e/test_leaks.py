"""Rounds of up, request, kill, down leave nothing behind."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from moesaic import Client
from tests.helpers.processes.live import (
    ON_RAY,
    TEXT,
    greedy,
    processes_of,
    running,
    text_of,
)
from tests.integration.conftest import save_model

pytestmark = ON_RAY
ROUNDS = 20


def open_files() -> Counter[str]:
    links: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links[str(fd.readlink())] += 1
        except FileNotFoundError:
            continue
    return links


def one_round(folder: Path) -> None:
    model = {"name": "m", "path": str(folder), "replicas": 2}
    with (
        running(
            "leak", folder, models=[model], hosts=[{"count": 2}], router={"port": 0}
        ) as cluster,
        Client(cluster.url or "") as client,
    ):
        before = client.complete(TEXT, **greedy("m", 8))
        assert before.usage.completion_tokens == 8
        os.kill(processes_of(cluster)["host-0"].pid, signal.SIGKILL)
        assert text_of(client, "m", 8) == before.text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_rounds_leave_nothing(tmp_path: Path) -> None:
    save_model(tmp_path, "mixtral")
    # The first round opens what Ray keeps for the life of a process.
    one_round(tmp_path)
    files = open_files()
    for _ in range(ROUNDS):
        one_round(tmp_path)
    more = open_files() - files
    sockets = Counter(file for file in more.elements() if file.startswith("socket:"))
    logs = Counter(file for file in more.elements() if "/session_" in file)
    assert more == sockets + logs
    # ray.init and ray.shutdown alone leave up to two closed sockets each in their process.
    assert sockets.total() <= 2 * ROUNDS
    assert logs.total() <= 1, "the log file of the last Ray, in place of the first one's"
