"""A model that nobody asks for leaves the hosts, and its first request brings it back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray

import moesaic
from moesaic import Client
from moesaic.actors.runtime.ray_border import CONTROLLER, namespace_of
from tests.helpers.processes.live import ON_RAY, replicas_of, term_of, text_of, wait_until
from tests.integration.conftest import save_model

pytestmark = ON_RAY


@pytest.mark.slow
def test_a_model_sleeps_and_its_first_request_wakes_it(tmp_path: Path) -> None:
    save_model(tmp_path / "sleepy", "mixtral")
    save_model(tmp_path / "other", "granitemoe")
    spec = {
        "name": f"sleep-{os.getpid()}",
        "models": [
            {"name": "sleepy", "path": str(tmp_path / "sleepy"), "idle_s": 6},
            {"name": "other", "path": str(tmp_path / "other")},
        ],
        "hosts": [{"count": 2, "threads": 1}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "balance": {"lease_s": 3, "auto": False},
    }
    with moesaic.up(spec) as cluster, Client(cluster.url or "") as client:
        wanted = {name: text_of(client, name, 20) for name in ("sleepy", "other")}
        before = sum(replicas_of(cluster).values())

        def asleep() -> bool:
            return {one.name: one.asleep for one in cluster.status().models}["sleepy"]

        def fall_asleep() -> None:
            wait_until(asleep)
            wait_until(lambda: sum(replicas_of(cluster).values()) < before)

        for _ in range(2):
            fall_asleep()
            status = cluster.status()
            assert not status.missing_experts
            assert text_of(client, "other", 20) == wanted["other"]
            assert asleep()
            assert text_of(client, "sleepy", 20) == wanted["sleepy"]
            assert not asleep()
        fall_asleep()
        # A controller that starts anew lets it sleep.
        held = sum(replicas_of(cluster).values())
        term = cluster.status().controller.term
        controller: Any = ray.get_actor(CONTROLLER, namespace=namespace_of(cluster.name))
        ray.kill(controller, no_restart=False)
        wait_until(lambda: term_of(cluster) > term)
        wait_until(lambda: cluster.status().placement is not None)
        assert asleep()
        assert sum(replicas_of(cluster).values()) == held
        # A trunk that starts while its model sleeps wakes it, too.
        model = cluster.from_pretrained("sleepy")
        assert model.config.model_type == "mixtral"
        assert not asleep()
