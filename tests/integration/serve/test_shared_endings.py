"""Clusters on one Ray and one Serve: draining or killing one leaves the other alone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

import moesaic
from moesaic import Client
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.actors.serve import trunk_apps
from moesaic.actors.serve.end_at_once import end_at_once
from moesaic.actors.serve.serve_border import find_serve
from moesaic.cluster.spec.spec import parse_spec
from moesaic.handle import Cluster
from moesaic.session import own_session, remove_session
from tests.helpers.endpoint.scripted import COUNT, SLOW_S, SLOWLY, scripted_engine
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import ON_RAY, program_ray, wait_until
from tests.integration.conftest import save_model

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("shared"), "mixtral")


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[None]:
    """One that no cluster started, and none ends."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patched.setattr(trunk_apps, "EngineFactory", lambda config: scripted_engine)
        with program_ray(8):
            try:
                yield
            finally:
                serve.shutdown()


def spec_of(folder: Path, name: str) -> dict[str, Any]:
    return {
        "name": f"{name}-{os.getpid()}",
        "models": [{"name": "m", "path": str(folder)}],
        "hosts": [{"count": 1, "num_cpus": 0.1, "threads": 1}],
        "trunk": {"threads": 1, "num_cpus": 0.1},
        "endpoint": {"port": 0, "drain_s": 30},
        "monitoring": {"port": 0},
        "router": {"port": 0},
        "balance": {"auto": False},
    }


def slow_answer(cluster: Cluster, seconds: float) -> int:
    with Client(cluster.url or "", retries=0) as client:
        asked = client.complete([SLOWLY], model="m", max_tokens=round(seconds / SLOW_S))
    return asked.usage.completion_tokens


def works(cluster: Cluster) -> bool:
    with Client(cluster.url or "", retries=0) as client:
        assert client.health()
        return client.complete([COUNT], model="m", max_tokens=2).usage.completion_tokens == 2


def actors_of(name: str) -> list[str]:
    known: Any = ray.util.list_named_actors(all_namespaces=True)
    return [
        actor["name"]
        for actor in known
        if actor["namespace"] == namespace_of(name)
        or f"::{namespace_of(name)}#" in actor["name"]
        or f"::{namespace_of(name)}:" in actor["name"]
    ]


@pytest.mark.slow
def test_draining_one_leaves_the_other_alone(folder: Path) -> None:
    said: list[str] = []
    with (
        moesaic.up(spec_of(folder, "stays")) as stays,
        ThreadPoolExecutor(3) as threads,
    ):
        goes = moesaic.up(spec_of(folder, "goes"))
        # It is below a prefix, and so are its probes.
        assert goes.url != stays.url
        assert works(goes)
        ending = threads.submit(slow_answer, goes, 8.0)
        going_on = threads.submit(slow_answer, stays, 14.0)
        time.sleep(1.5)
        down = threads.submit(goes.down, told=said.append)
        statuses: set[int] = set()
        with httpx.Client(trust_env=False, timeout=10) as http:
            while not down.done():
                answer = http.post(
                    f"{goes.url}/v1/completions",
                    json={"model": "m", "prompt": [COUNT], "max_tokens": 1},
                )
                if answer.status_code == 503 and 503 not in statuses:
                    assert http.get(f"{goes.url}/livez").status_code == 200
                    assert http.get(f"{goes.url}/readyz").status_code == 503
                statuses.add(answer.status_code)
                assert works(stays)
                time.sleep(0.1)
        down.result()
        assert ending.result(30) == round(8.0 / SLOW_S)
        # The slow one, and perhaps one of those above.
        assert re.match("ending: (1 answer is|2 answers are) still running, at most ", said[0])
        assert said[-1] == "ending: nothing is running any more"
        # Before it began, while it drained, and when Serve had forgotten it.
        assert statuses <= {200, 503, 404}
        assert 503 in statuses
        assert actors_of(goes.name) == []
        assert going_on.result(30) == round(14.0 / SLOW_S)
        assert works(stays)


@pytest.mark.slow
def test_ending_one_at_once_leaves_the_other_alone(folder: Path) -> None:
    with moesaic.up(spec_of(folder, "stays")) as stays:
        dies = moesaic.up(spec_of(folder, "dies"))
        # As a process says it that has joined the Ray.
        wanted = parse_spec(spec_of(folder, "dies") | {"ray": {"address": "auto"}})
        began = time.monotonic()
        end_at_once(wanted)
        assert time.monotonic() - began < 15
        wait_until(lambda: actors_of(dies.name) == [], 5.0)
        running = find_serve()
        assert running is not None
        assert running.of(namespace_of(stays.name)) == sorted(running.routes)
        assert works(stays)
        end_at_once(wanted)  # again: nothing is left to end
        assert works(stays)
        dies.detach()
        session = own_session(dies.name)
        assert session is not None
        remove_session(session)
