"""Ray's own autoscaler with its fake node provider: hosts that find no room bring a node up, and a
node without hosts goes again. In network and process namespaces of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.helpers.processes.apart import (
    UNSHARE,
    need_namespaces,
    ray_environment,
    report_of_driver,
)
from tests.integration.conftest import save_model


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_comes_with_a_host_and_goes_with_it(tmp_path: Path) -> None:
    need_namespaces()
    folder = save_model(tmp_path / "model", "mixtral", num_experts_per_tok=4)
    environment = ray_environment(
        tmp_path,
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="0",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )
    # Ray's sockets lie below it, and their names may have 107 characters.
    with TemporaryDirectory(prefix="moe", dir="/tmp") as ray_dir:
        words = [sys.executable, "-m", "tests.e2e.scaled_nodes", str(folder), ray_dir]
        report = report_of_driver([*UNSHARE, *words], environment)
    assert report["texts"] == [report["expected"]], "no token changed"
    assert report["requests"] >= 3
    assert report["error"] is None
    assert report["nodes"] == {"before": 1, "grown": 2, "after": 1}
    head, other = report["head"], report["node_of_new_host"]
    assert other != head
    assert report["leaving"] == ["host-2"]
    assert "no machine has had room for it yet (1 CPU, 1 place)" in report["waiting"]
