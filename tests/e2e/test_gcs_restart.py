"""Ray's GCS dies and comes back, with its embedded RocksDB storage: nothing is lost."""

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

ADDRESS = "10.231.8.1"
# Ray does not take loopback's own address.
ADDRESSED = f'ip link set lo up && ip addr add {ADDRESS}/32 dev lo && exec "$@"'


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_restarted_gcs_is_not_noticed(tmp_path: Path) -> None:
    need_namespaces()
    folder = save_model(tmp_path / "model", "mixtral", num_experts_per_tok=4)
    # Ray's sockets lie below it, and their names may have 107 characters.
    with TemporaryDirectory(prefix="moe", dir="/tmp") as ray_dir:
        environment = ray_environment(
            tmp_path,
            RAY_gcs_storage="rocksdb",
            RAY_gcs_storage_path=f"{ray_dir}/gcs",
            RAY_ADDRESS=f"{ADDRESS}:6399",
        )
        words = [sys.executable, "-m", "tests.e2e.gcs_restart", str(folder), ray_dir, ADDRESS]
        report = report_of_driver([*UNSHARE, "sh", "-c", ADDRESSED, "sh", *words], environment)
    for when in ("while_down", "streamed", "after", "at_last"):
        assert report[when] == report["expected"], when
    assert report["same_controller"]
    assert report["leaving"] == ["host-1"]
