"""Whole steps of a run over hosts in this process, and the same steps of the plain model.

They are AdamW's, with clipping and weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.actors.trunk.attach import expert_tensors
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.training.orders import BulkKey
from moesaic.models.trunk.experts_layers import experts_layers
from tests.helpers.training.runs import LocalPool, held, optimizing, training_pool
from tests.helpers.training.trunks import IDS, assert_near, loss_of, plain_model

F64 = torch.float64


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
    names = {id(one) for layer in layers for one in layer.module.parameters()}
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


def states(optimizer: RunOptimizer, pool: LocalPool) -> dict[Any, dict[str, Tensor]]:
    """What owners keep; those of one key must have the same bits."""
    run: Any = optimizer.run
    found: dict[Any, dict[str, Tensor]] = {}
    for key, hosts in run.lead.steps.owners.items():
        for host in hosts:
            wanted = BulkKey("state", key, run=run.run)
            with pool.alive[host].training.reading(wanted) as state:
                mine = {name: tensor.clone() for name, tensor in state.items()}
            assert all(torch.equal(found.setdefault(key, mine)[n], t) for n, t in mine.items())
    return found


@contextmanager
def stepped_as_plain(
    folder: Path, hosts: int, replicas: int, redundancy: int, *, borrows: bool
) -> Iterator[tuple[LocalPool, RunOptimizer]]:
    """A pool after three steps that were those of the plain model; the run ends with the block."""
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=hosts, replicas=replicas, borrows=borrows) as pool,
        optimizing(pool, folder, borrows=borrows, redundancy=redundancy) as (model, optimizer),
    ):
        found = [one_step(model, optimizer, step) for step in range(3)]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
        yield pool, optimizer
