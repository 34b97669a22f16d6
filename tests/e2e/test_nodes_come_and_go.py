"""Ray's own autoscaler with its fake node provider: hosts that find no room bring a node up, and a
node without hosts goes again. In network and process namespaces of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.integration.conftest import save_model

# The kernel ends everything in it when the driver ends.
APART = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def apart() -> list[str]:
    if shutil.which("unshare") is None or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("namespaces need root, unshare and iproute2")
    tried = subprocess.run([*APART, "true"], capture_output=True, timeout=10, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces are not allowed here: {tried.stderr.decode().strip()}")
    return APART


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_comes_with_a_host_and_goes_with_it(apart: list[str], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral", num_experts_per_tok=4)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_USAGE_STATS_ENABLED": "0",
        # Every process of a Ray cluster must show the same token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "MOESAIC_CACHE": str(tmp_path / "cache"),
    }
    # Ray's sockets lie below it, and their names may have 107 characters.
    with TemporaryDirectory(prefix="moe", dir="/tmp") as ray_dir:
        driver = subprocess.run(
            [*apart, sys.executable, "-m", "tests.e2e.scaled_nodes", str(folder), ray_dir],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    lines = [line for line in driver.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, driver.stdout + driver.stderr
    report = json.loads(lines[0].removeprefix("REPORT "))
    assert report["texts"] == [report["expected"]], "no token changed"
    assert report["requests"] >= 3
    assert report["error"] is None
    assert report["nodes"] == {"before": 1, "grown": 2, "after": 1}
    head, other = report["head"], report["node_of_new_host"]
    assert other != head
    assert report["leaving"] == ["host-2"]
    assert "no machine has had room for it yet (1 CPU, 1 place)" in report["waiting"]
