"""A pool grows and shrinks by itself under a training run, whose losses do not tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.handle import Cluster
from tests.helpers.processes.live import ON_RAY, hosts_of, running
from tests.integration.cluster.test_training_on_ray import IDS, one_step
from tests.integration.conftest import save_model

pytestmark = ON_RAY


def owners(cluster: Cluster) -> set[str]:
    training = cluster.status().training
    assert training is not None
    return {host for host, size in training.owned_bytes.items() if size}


@pytest.mark.slow
def test_a_run_trains_on_while_hosts_come_and_go(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "mixtral")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    group = {"count": 1, "min_count": 1, "max_count": 2, "emulate": {"call_us": 40_000}}
    scale = {
        "scale_up_above": 0.4,
        "scale_down_below": 0.15,
        "up_after_s": 2,
        "down_after_s": 2,
        "cooldown_s": 2,
    }
    model = {"name": "m", "path": str(folder), "train": True}
    with running(
        "elastic",
        folder,
        hosts=[group],
        models=[model],
        balance={"lease_s": 2},
        autoscale=scale,
    ) as cluster:
        trunk = cluster.from_pretrained("m", train=True)
        found: list[float] = []
        with moesaic.PoolOptimizer(trunk, cluster, lr=1e-3) as optimizer:

            def train_until(condition: Callable[[], bool], pause_s: float) -> None:
                until = time.monotonic() + 120.0
                while not condition():
                    assert time.monotonic() < until, cluster.status().scaling
                    found.append(one_step(trunk, optimizer, (IDS + len(found)) % 32))
                    time.sleep(pause_s)

            train_until(lambda: len(hosts_of(cluster)) == 2, 0.0)
            train_until(lambda: owners(cluster) == {"host-0"}, 0.0)
            told = cluster.status().training
            assert told is not None
            assert told.step_s
            assert told.tokens_per_s
            # Lighter: hosts wait most of the time.
            train_until(lambda: len(hosts_of(cluster)) == 1, 2.0)
            for _ in range(3):
                found.append(one_step(trunk, optimizer, (IDS + len(found)) % 32))
        grown, *_, shrunk = cluster.status().scaling.recent
        assert (grown.initiator, grown.hosts_before, grown.target_hosts) == ("autoscaler", 1, 2)
        assert (shrunk.initiator, shrunk.hosts_before, shrunk.target_hosts) == ("autoscaler", 2, 1)
        expected = [one_step(plain, adam, (IDS + step) % 32) for step in range(len(found))]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-4
