"""What several tests of PoolOptimizer do with a small model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.helpers.training.in_process import InProcessRun, differences

LR: dict[str, Any] = {"lr": 1e-2}
# Names of experts' parameters by layer.
UP = "model.layers.{}.mlp.experts.gate_up_proj"
DOWN = "model.layers.{}.mlp.experts.down_proj"


def loss_of(model: Any, seed: int = 0) -> Tensor:
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def learn(run: InProcessRun, seed: int = 0) -> None:
    loss_of(run.trunk, seed).backward()


def unchanged(start: Any, run: InProcessRun) -> bool:
    return max(differences(start, run).values()) == 0.0


def plain_steps(start: Any, seeds: list[int]) -> Any:
    plain = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(plain.parameters(), **LR)
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(plain, seed).backward()
        optimizer.step()
    return plain
