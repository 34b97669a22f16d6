"""Whole runs over hosts in this process: RunOptimizer, its run, owners, replicas, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.training.opening import plan_run
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.actors.training.run import LearningTrunk, PoolRun
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.trunk.attach import expert_tensors
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.kernels.training.update_rules import UpdateRule
from moesaic.models.training.groups import TrainedTensors
from moesaic.models.training.trainable_trunk import TrainableTrunk
from moesaic.models.trunk.experts_layers import experts_layers
from tests.helpers.pool.runs import LocalPool, LocalTrunk, held, training_pool
from tests.helpers.pool.training import IDS, assert_near, loss_of, plain_model, saved

F64 = torch.float64
DECAY = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@contextmanager
def optimizing(
    pool: LocalPool,
    folder: Path,
    *,
    dtype: torch.dtype = F64,
    borrows: bool = False,
    redundancy: int = 0,
    run: int = 1,
    **options: Any,
) -> Iterator[tuple[Any, RunOptimizer]]:
    trunk = LocalTrunk(pool, folder, dtype, borrows=borrows)
    opened = TrainableTrunk(trunk.model, pool.hosts.layers, dtype)
    learning = LearningTrunk(model=trunk.model, learning=trunk.learning, name="worker")

    def open_run(trained: TrainedTensors, rule: UpdateRule) -> PoolRun:
        plan = plan_run(
            run,
            pool.hosts.ref.name,
            learning,
            pool.hosts.layers,
            trained,
            rule,
            redundancy=redundancy,
            exact=False,
        )
        versions = pool.hosts.placement.versions
        number = versions.of(ExpertKey("m", 0, 0)) + 1
        links = BulkLinks("here")
        return PoolRun(pool, links, learning, plan, versions=versions, next_version=number)

    optimizer = RunOptimizer(trunk.model, open_run, **(DECAY | options))
    try:
        yield trunk.model, optimizer
    finally:
        optimizer.close()
        opened.close()


def microbatches(step: int) -> list[Tensor]:
    return [(IDS + step) % 32, (IDS[:1] * 3 + step) % 32]


def one_step(model: Any, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
    """The loss, and the norm that clips."""
    mean = 0.0
    for ids in microbatches(step):
        loss = loss_of(model, ids) / 2
        loss.backward()
        mean += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return mean, float(norm)


def assert_same_model(pool: LocalPool, trunk: Any, plain: Any, tolerance: float) -> None:
    """Trunk and experts have the plain model's values; replicas have the same bits."""
    own = dict(trunk.named_parameters())
    layers = experts_layers(plain)
    names = {id(p) for layer in layers for p in layer.module._parameters.values() if p is not None}
    for name, wanted in plain.named_parameters():
        if id(wanted) not in names:
            assert_near(own[name].detach(), wanted.detach(), tolerance, name)
    keys = [ExpertKey("m", la.layer, expert) for la in layers for expert in range(la.num_experts)]
    found = held(pool, keys)
    for layer in layers:
        for expert in range(layer.num_experts):
            key = ExpertKey("m", layer.layer, expert)
            for name, wanted in expert_tensors(layer, expert).items():
                assert_near(found[key][name], wanted, tolerance, f"{key} {name}")


def plain_run(folder: Path, steps: int, dtype: torch.dtype = F64) -> tuple[Any, list[Any]]:
    plain = plain_model(folder, dtype)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    return plain, [one_step(plain, optimizer, step) for step in range(steps)]


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize(
    ("hosts", "replicas", "redundancy"), [(1, 1, 0), (2, 1, 0), (3, 2, 0), (3, 2, 1), (3, 3, 2)]
)
def test_steps_are_those_of_the_plain_model(
    folder: Path, hosts: int, replicas: int, redundancy: int, borrows: bool
) -> None:
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=hosts, replicas=replicas, borrows=borrows) as pool,
        optimizing(pool, folder, borrows=borrows, redundancy=redundancy) as (model, optimizer),
    ):
        found = [one_step(model, optimizer, step) for step in range(3)]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
    assert pool.ended
    assert all(host.report().owned == 0 for host in pool.hosts.hosts)


@pytest.mark.parametrize("architecture", ["gpt_oss", "deepseek_v3", "nemotron_h", "qwen2_moe"])
def test_a_step_of_other_architectures(tmp_path: Path, architecture: str) -> None:
    folder = saved(tmp_path, architecture)
    # AdamW's first step divides a gradient by its own size.
    tolerance = 1e-5 if architecture == "nemotron_h" else 1e-12
    plain, _ = plain_run(folder, 1)
    with (
        training_pool(folder, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        assert_same_model(pool, model, plain, tolerance)
