"""A trunk on Ray counts as started once it has made a token; until then others get the requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.actors.serve import trunk_apps
from moesaic.handle import Cluster
from tests.helpers.endpoint.scripted import COUNT, GATE, gated_engine
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import ON_RAY, running, text_of, wait_until
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.slow]

MODEL = "m"
REQUESTS = "moesaic_request_latency_seconds_count"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def gated(folder: Path, gate: Path) -> Iterator[Cluster]:
    """Two trunks that make their first token only while no file is at the gate."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patched.setenv(GATE, str(gate))
        patched.setattr(trunk_apps, "EngineFactory", lambda config: gated_engine)
        trunk = {"cache_tokens": 1024, "threads": 1, "min_replicas": 2, "max_replicas": 2}
        hosts = [{"count": 1, "threads": 1}]
        with running("gated", folder, hosts=hosts, trunk=trunk) as cluster:
            yield cluster


def total(cluster: Cluster, metric: str) -> float:
    text = httpx.get(f"{cluster.monitoring}/metrics", timeout=10, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith(metric)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def trunks(cluster: Cluster) -> list[psutil.Process]:
    title = f"::ServeReplica:moesaic-{cluster.name}:{MODEL}:Trunk"
    return [one for one in started_processes() if title in " ".join(one.cmdline())]


def replicas(cluster: Cluster) -> dict[str, int]:
    app = serve.status().applications[f"moesaic-{cluster.name}:{MODEL}"]
    found: Any = app.deployments[f"Trunk-{MODEL}"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in found.items() if count}


def test_a_trunk_without_a_token_gets_no_requests(gated: Cluster, gate: Path) -> None:
    wait_until(lambda: replicas(gated) == {"RUNNING": 2})
    gate.touch()
    killed, _ = trunks(gated)
    killed.kill()
    # The next one starts, and waits for its first token.
    wait_until(lambda: replicas(gated) == {"RUNNING": 1, "STARTING": 1})
    wait_until(lambda: len(trunks(gated)) == 2)
    with Client(gated.url or "", retries=0) as client:
        for _ in range(20):
            assert client.complete([COUNT], model=MODEL, max_tokens=2).usage.completion_tokens == 2
    assert httpx.get(f"{gated.url}/readyz", timeout=10, trust_env=False).status_code == 200
    assert replicas(gated) == {"RUNNING": 1, "STARTING": 1}
    gate.unlink()
    wait_until(lambda: replicas(gated) == {"RUNNING": 2})


def test_the_first_token_is_made_by_the_pool_and_is_no_request(folder: Path) -> None:
    with running("token", folder, hosts=[{"count": 1, "threads": 1}]) as cluster:
        with Client(cluster.monitoring or "") as operator:
            work = operator.status().engines[MODEL].work
        assert work is not None
        assert (work.steps, work.running_requests, work.waiting_requests) == (1, 0, 0)
        wait_until(lambda: total(cluster, "moesaic_model_assignments_total") > 0)
        assert total(cluster, REQUESTS) == 0
        with Client(cluster.url or "") as client:
            assert text_of(client, MODEL, 4)
        assert total(cluster, REQUESTS) == 1
