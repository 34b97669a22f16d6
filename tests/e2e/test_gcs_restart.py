"""Ray's GCS dies and comes back, with its embedded RocksDB storage: nothing is lost."""

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

ADDRESS = "10.231.8.1"


def in_namespaces(*command: str) -> list[str]:
    """The command in network and process namespaces of its own; whatever it starts ends with it."""
    setup = f'ip link set lo up && ip addr add {ADDRESS}/32 dev lo && exec "$@"'
    unshare = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return [*unshare, "sh", "-c", setup, "sh", *command]


def need_namespaces() -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("namespaces need root, unshare and iproute2")
    tried = subprocess.run(in_namespaces("true"), capture_output=True, check=False, timeout=20)
    if tried.returncode:
        pytest.skip(f"namespaces are not allowed here: {tried.stderr.decode().strip()}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_restarted_gcs_is_not_noticed(tmp_path: Path) -> None:
    need_namespaces()
    folder = save_model(tmp_path / "model", "mixtral", num_experts_per_tok=4)
    # Ray's sockets lie below it, and their names may have 107 characters.
    with TemporaryDirectory(prefix="moe", dir="/tmp") as ray_dir:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": f"{ray_dir}/gcs",
            "RAY_ADDRESS": f"{ADDRESS}:6399",
            "MOESAIC_CACHE": str(tmp_path / "cache"),
        }
        words = [sys.executable, "-m", "tests.e2e.gcs_restart", str(folder), ray_dir, ADDRESS]
        run = subprocess.run(
            in_namespaces(*words),
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, run.stdout + run.stderr
    report = json.loads(lines[0].removeprefix("REPORT "))
    for when in ("while_down", "streamed", "after", "at_last"):
        assert report[when] == report["expected"], when
    assert report["same_controller"]
    assert report["leaving"] == ["host-1"]
