"""What happens to the pool is told in the controller's log. The last of this folder: it kills."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from moesaic.actors.runtime.log_lines import is_log_line
from moesaic.handle import Cluster
from tests.helpers.processes.live import ON_RAY, wait_replaced

pytestmark = [*ON_RAY, pytest.mark.slow]


def test_what_happens_to_the_pool_is_told(pool: Cluster) -> None:
    change = pool.rebalance()
    killed = pool.status().processes["host-1"].pid
    os.kill(killed, signal.SIGKILL)
    wait_replaced(pool, "host-1", killed)

    def told() -> list[str]:
        texts = [line.text for line in pool.logs(["controller"], tail=1_000_000)]
        lines = [json.loads(text) for text in texts if is_log_line(text)]
        return [line["message"] for line in lines if line["level"] in ("info", "warning")]

    number = change.id
    expected = [
        "controller of cluster",
        "host host-0 is up",
        "host host-1 is up",
        "is published",
        f"change {number} begins",
        f"change {number} ends",
        "host host-1 has died",
        "host host-1 is replaced",
    ]

    def missing() -> list[str]:
        said = told()
        return [part for part in expected if not any(part in message for message in said)]

    deadline = time.monotonic() + 30.0
    while missing() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert missing() == [], told()
    assert len([message for message in told() if "host-1 has died" in message]) == 1
