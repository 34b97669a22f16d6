"""Training over a cluster on Ray, as its users do it, while others are answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moesaic
from moesaic import Client
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError, StepLost
from tests.helpers.models.architectures import tiny_model
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    running,
    text_in_background,
    wait_replaced,
    wait_until,
)
from tests.helpers.training.trunks import assert_near
from tests.integration.conftest import save_model

pytestmark = ON_RAY

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Cluster]:
    model = {"name": "m", "path": str(folder), "replicas": 2, "train": True}
    with running("training", folder, hosts=[{"count": 3}], models=[model]) as cluster:
        yield cluster


def one_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_a_served_model_learns_while_it_answers(
    pool: Cluster, folder: Path, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    batches = [(IDS + step) % 32 for step in range(8)]
    expected = [one_step(plain, adam, ids) for ids in batches]
    model = pool.from_pretrained("m", train=True)
    with (
        Client(pool.url or "") as client,
        text_in_background(client, "m", 100) as text,
        moesaic.PoolOptimizer(model, pool, lr=1e-3, redundancy=1) as optimizer,
    ):
        with pytest.raises(ClusterError, match="run 1 trains it"):
            pool.update_expert("m", pool.get_expert("m", 0, 0))
        found = [one_step(model, optimizer, ids) for ids in batches[:3]]
        training = pool.status().training
        assert training is not None
        assert (training.model, training.steps) == ("m", 3)
        owned = training.owned_tensors
        # A drained host hands over what it owns; a killed one costs a step at most.
        drained = pool.drain("host-2", timeout_s=30.0)
        assert not drained.under_way, drained
        assert (pool.status().training or training).owned_tensors.get("host-2", 0) == 0
        assert owned["host-2"] > 0
        pool.undrain("host-2")
        victim = processes_of(pool)["host-1"].pid
        os.kill(victim, signal.SIGKILL)
        while len(found) < len(batches):
            try:
                found.append(one_step(model, optimizer, batches[len(found)]))
            except StepLost:
                optimizer.zero_grad()
        wait_replaced(pool, "host-1", victim)
        model.save_pretrained(tmp_path)
        assert text()
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, wanted in plain.named_parameters():
        # AdamW divides small gradients by their own size, rounding included.
        assert_near(saved.get_parameter(name).detach(), wanted.detach(), 1e-3, name)
    wait_until(lambda: pool.status().training is None)


TRAINS = """
import sys
import moesaic
from tests.integration.cluster.test_training_on_ray import IDS, one_step

cluster = moesaic.connect(sys.argv[1])
model = cluster.from_pretrained("m", train=True)
with moesaic.PoolOptimizer(model, cluster, lr=1e-3) as optimizer:
    for step in range(100):
        print(one_step(model, optimizer, (IDS + step) % 32), flush=True)
"""


def test_another_process_goes_on_where_one_was_killed(pool: Cluster, tmp_path: Path) -> None:
    with moesaic.PoolOptimizer(pool.from_pretrained("m", train=True), pool) as optimizer:
        optimizer.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    found: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-c", TRAINS, pool.name], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found += [float(process.stdout.readline()) for _ in range(3)]
        process.kill()
        found += [float(line) for line in process.stdout if line.endswith("\n")]
    model = pool.from_pretrained("m", train=True)
    with pytest.raises(ClusterError, match="one run trains at a time"):
        moesaic.PoolOptimizer(model, pool, lr=1e-3)
    with moesaic.PoolOptimizer(model, pool, lr=1e-3, succeed=True) as optimizer:
        done = optimizer.run.step
        assert len(found) <= done <= len(found) + 1
        found = found[:done]
        later = [one_step(model, optimizer, (IDS + step) % 32) for step in range(done, done + 3)]
    expected = [one_step(plain, adam, (IDS + step) % 32) for step in range(done + 3)]
    found += expected[len(found) : done] + later
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-5


def test_a_model_in_memory_learns(pool: Cluster) -> None:
    model = pool.attach(tiny_model("gpt_oss"), name="memory", train=True)
    with moesaic.PoolOptimizer(model, pool, optimizer="SGD", lr=0.1) as optimizer:
        found = [one_step(model, optimizer, IDS) for _ in range(4)]
    assert found[-1] < found[0]


TORCHRUN = "-m", "torch.distributed.run", "--nproc-per-node", "2"


@pytest.mark.parametrize(
    ("script", "within"),
    [
        ("loop", ()),
        ("workers", TORCHRUN),
        pytest.param("trainer", (), marks=pytest.mark.slow),
    ],
)
def test_an_example_trains(
    pool: Cluster, script: str, within: tuple[str, ...], tmp_path: Path
) -> None:
    path = ROOT / "examples" / "train" / f"{script}.py"
    done = subprocess.run(
        [sys.executable, *within, str(path), pool.name, "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    wait_until(lambda: pool.status().training is None)
