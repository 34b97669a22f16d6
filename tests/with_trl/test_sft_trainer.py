"""TRL's SFTTrainer, unchanged, over a pool: it logs and saves what it does of the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.actors.training.optimizer import RunOptimizer
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.trunks import assert_near
from tests.integration.conftest import save_model

trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")

STEPS = 20


def conversations() -> Any:
    words = ["red", "green", "blue", "one", "two", "three", "north", "south"]
    asked = [
        [
            {"role": "user", "content": f"What comes after {word}?"},
            {"role": "assistant", "content": f"After {word} comes {words[(n + 1) % len(words)]}."},
        ]
        for n, word in enumerate(words)
    ]
    return datasets.Dataset.from_list([{"messages": one} for one in asked * 8])


def trainer_of(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        max_length=128,
        packing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=conversations(),
        processing_class=tiny_tokenizer(),
        optimizers=(optimizer, None),
    )


def logged(trainer: Any, what: str) -> list[float]:
    return [one[what] for one in trainer.state.log_history if what in one]


def test_it_is_unchanged(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    expected = trainer_of(plain, adam, tmp_path / "plain")
    expected.train()
    with (
        training_pool(folder, hosts=2, replicas=2, dtype=torch.float32) as pool,
        optimizing(pool, folder, dtype=torch.float32, lr=1e-3) as (model, optimizer),
    ):
        assert isinstance(optimizer, RunOptimizer)
        trainer = trainer_of(model, optimizer, tmp_path / "pool")
        trainer.train()
        trainer.save_model()
    losses, norms = (
        torch.tensor([logged(one, what) for one in (trainer, expected)])
        for what in ("loss", "grad_norm")
    )
    assert losses.shape == (2, STEPS)
    assert (losses[0] - losses[1]).abs().max() < 1e-5
    assert (norms[0] / norms[1] - 1).abs().max() < 1e-6
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pool", dtype=torch.float32)
    for name, wanted in plain.named_parameters():
        assert_near(saved.get_parameter(name).detach(), wanted.detach(), 1e-5, name)
