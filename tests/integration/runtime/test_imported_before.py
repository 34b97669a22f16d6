"""A program that has imported Ray before it starts a cluster."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300), pytest.mark.slow]

PROGRAM = """
import ray
import moesaic

hosts = [{"count": 1, "threads": 1, "num_cpus": 0.1}]
with moesaic.up({"name": "imported", "hosts": hosts, "endpoint": None}) as cluster:
    print([host.name for host in cluster.status().hosts], ray.get_runtime_context().gcs_address)
"""


def test_ray_may_be_imported_first() -> None:
    # Without the variable Ray takes the machine's address for loopback when it is imported.
    hidden = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['host-0'] 127.0.0.1:")
