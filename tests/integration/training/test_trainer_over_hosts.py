"""transformers' Trainer, unchanged, over hosts: it logs and saves what it does without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.trainers import trainer_arguments
from tests.helpers.training.trunks import assert_near, plain_model, saved

STEPS = 20


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(32, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Trainer:
    """Train at the defaults, which clip, and save the model."""
    arguments = trainer_arguments(folder, STEPS)
    trainer = Trainer(model, arguments, train_dataset=Texts(), optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model()
    return trainer


def logged(trainers: tuple[Trainer, Trainer], what: str) -> Tensor:
    """What both logged at each step, (2, steps)."""
    logs = [[one[what] for one in each.state.log_history if what in one] for each in trainers]
    return torch.tensor(logs, dtype=torch.float64)


# In float32 the last digits depend on the CPU.
@pytest.mark.parametrize(
    ("dtype", "loss", "norm", "weight"),
    [
        (torch.float64, 1e-12, 1e-12, 1e-10),
        pytest.param(torch.float32, 1e-5, 1e-6, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_it_is_unchanged(
    tmp_path: Path, dtype: torch.dtype, loss: float, norm: float, weight: float
) -> None:
    """Losses, relative norms and weights are within these bounds."""
    # Its auxiliary loss trains the gates, too.
    folder = saved(tmp_path / "model", "mixtral", output_router_logits=True)
    plain = plain_model(folder, dtype)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    expected = train(plain, adam, tmp_path / "plain")
    with (
        training_pool(folder, hosts=2, replicas=2, dtype=dtype) as pool,
        optimizing(pool, folder, dtype=dtype, lr=1e-3) as (model, optimizer),
    ):
        found = train(model, optimizer, tmp_path / "pool")
    losses, norms = (logged((found, expected), what) for what in ("loss", "grad_norm"))
    assert losses.shape == (2, STEPS)
    assert (losses[0] - losses[1]).abs().max() < loss
    assert (norms[0] / norms[1] - 1).abs().max() < norm
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pool", dtype=dtype)
    for name, wanted in plain.named_parameters():
        assert_near(again.get_parameter(name).detach(), wanted.detach(), weight, name)
