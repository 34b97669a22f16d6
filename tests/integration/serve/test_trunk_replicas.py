"""Trunks under Serve's own autoscaling: none while nobody asks, more than one under load."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray import serve

import moesaic
from moesaic import Client
from moesaic.actors.serve.replica.names import trunk_app, trunk_name
from moesaic.cluster.reports.status import EngineStatus
from tests.helpers.processes.live import ON_RAY, text_of, wait_until
from tests.integration.conftest import save_model

MODEL = "m"

pytestmark = ON_RAY


def replicas(app: str) -> int:
    found: Any = serve.status().applications[trunk_app(app, MODEL)].deployments[trunk_name(MODEL)]
    return found.replica_states.get("RUNNING", 0)


@pytest.mark.slow
def test_trunks_scale_to_zero_and_to_two(tmp_path: Path) -> None:
    save_model(tmp_path, "mixtral")
    name = f"trunks-{os.getpid()}"
    spec = {
        "name": name,
        "models": [{"name": MODEL, "path": str(tmp_path)}],
        "hosts": [{"count": 1, "threads": 1}],
        "trunk": {
            "cache_tokens": 1024,
            "threads": 1,
            "min_replicas": 0,
            "max_replicas": 2,
            "target_requests": 1,
        },
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "autoscale": {"up_after_s": 1, "down_after_s": 5},
        "balance": {"lease_s": 3},
    }
    app = f"moesaic-{name}"
    with moesaic.up(spec) as cluster, Client(cluster.url or "") as client:
        assert replicas(app) == 1
        wanted = text_of(client, MODEL, 100)
        wait_until(lambda: replicas(app) == 0)
        # Asking for the state wakes nobody.
        with Client(cluster.monitoring or "") as operator:
            assert operator.status().engines[MODEL] == EngineStatus(
                healthy=True, starts_on_demand=True, last_error=None, work=None
            )
        assert client.health()
        assert client.health(MODEL)
        assert replicas(app) == 0
        wait_until(lambda: not cluster.status().routers)
        assert text_of(client, MODEL, 100) == wanted
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(text_of, client, MODEL, 100) for _ in range(6)]
            while replicas(app) < 2:
                assert len(asked) < 500, "no second trunk came"
                assert asked.pop(0).result(120) == wanted
                asked.append(pool.submit(text_of, client, MODEL, 100))
            # Each is a router of its own.
            wait_until(lambda: len(cluster.status().routers) == 2)
            assert {one.result(120) for one in asked} == {wanted}
