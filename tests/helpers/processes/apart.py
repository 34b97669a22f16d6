"""Tests that need a Ray of their own, apart from this process's: in namespaces, as drivers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

# The kernel ends everything in it when the driver ends.
UNSHARE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
DRIVER_S = 300.0


def need_namespaces() -> None:
    """Skips the test where namespaces cannot be made."""
    if shutil.which("unshare") is None or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("namespaces need root, unshare and iproute2")
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=20, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces are not allowed here: {tried.stderr.decode().strip()}")


def ray_environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Nothing of this process's Ray, and one token: every process of a Ray must show the same."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MOESAIC_CACHE": str(tmp_path / "cache"),
        **more,
    }


def report_of_driver(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a driver prints behind REPORT, as JSON."""
    driver = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DRIVER_S,
        check=False,
    )
    lines = [line for line in driver.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, driver.stdout + driver.stderr
    return json.loads(lines[0].removeprefix("REPORT "))
