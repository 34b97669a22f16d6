"""transformers' Trainer, unchanged, over a trunk and over the plain model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from moesaic.proto.errors import BadInput
from tests.helpers.models.architectures import tiny_model
from tests.helpers.training.in_process import differences, open_run, training
from tests.helpers.training.trainers import trainer_arguments

pytest.importorskip("accelerate")

STEPS = 20
SETTINGS: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.0}
AUX: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 96, (12,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def plain_model(seed: int = 0) -> Any:
    return tiny_model("mixtral", seed=seed, **AUX).train()


def trainer_of(
    model: Any,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    *,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer at its defaults but for what is logged and how long it goes on."""
    args = trainer_arguments(folder, STEPS, **arguments)
    return Trainer(
        model=model,
        args=args,
        train_dataset=Texts(),
        eval_dataset=torch.utils.data.Subset(Texts(), range(2)),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def logged(trainer: Trainer, what: str) -> list[float]:
    return [one[what] for one in trainer.state.log_history if what in one]


def trained_plain(plain: Any, folder: Path) -> tuple[Trainer, Any]:
    model = copy.deepcopy(plain)
    trainer = trainer_of(model, torch.optim.AdamW(model.parameters(), **SETTINGS), folder)
    trainer.train()
    return trainer, model


def test_the_trainer_at_its_defaults_logs_what_it_logs_of_the_plain_model(tmp_path: Path) -> None:
    start = plain_model()
    wanted, plain = trained_plain(start, tmp_path / "plain")
    assert min(logged(wanted, "grad_norm")) > 1.0  # clipping is active
    run = open_run(start)
    with training(run, **SETTINGS) as optimizer:
        found = trainer_of(run.trunk, optimizer, tmp_path / "pool")
        found.train()
    assert len(logged(found, "loss")) == STEPS == run.step
    assert logged(found, "loss") == pytest.approx(logged(wanted, "loss"), abs=1e-5)
    assert logged(found, "grad_norm") == pytest.approx(logged(wanted, "grad_norm"), rel=1e-6)
    assert logged(found, "learning_rate") == logged(wanted, "learning_rate")
    assert max(differences(plain, run).values()) < 1e-4
    assert min(differences(start, run).values()) > 1e-4


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def test_a_run_that_is_resumed_by_the_trainer_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path,
) -> None:
    start = plain_model()
    whole = open_run(start)
    with training(whole, **SETTINGS) as optimizer:
        wanted = trainer_of(whole.trunk, optimizer, tmp_path / "whole")
        wanted.train()

    saving: Mapping[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    first = open_run(start)
    with training(first, **SETTINGS) as optimizer:
        stopped = trainer_of(
            first.trunk, optimizer, tmp_path / "run", callbacks=[StopAt(8)], **saving
        )
        stopped.train()
    folder = tmp_path / "run" / "checkpoint-6"

    # Another process has other weights and a new run.
    second = open_run(plain_model(seed=1), first.checkpoints)
    with training(second, **SETTINGS) as optimizer:
        resumed = trainer_of(second.trunk, optimizer, tmp_path / "run", **saving)
        resumed.train(resume_from_checkpoint=str(folder))
    assert second.run > first.run
    assert logged(resumed, "loss")[6:] == logged(wanted, "loss")[6:]
    assert logged(resumed, "grad_norm")[6:] == logged(wanted, "grad_norm")[6:]
    assert max(differences(whole.put_together(), second).values()) == 0.0


def test_what_the_trainer_saves_has_all_experts(tmp_path: Path) -> None:
    run = open_run(plain_model())
    with training(run, **SETTINGS) as optimizer:
        trainer = trainer_of(run.trunk, optimizer, tmp_path, callbacks=[StopAt(2)])
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", output_loading_info=True
        )
        found, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert max(differences(found, run).values()) == 0.0


def test_the_best_model_is_not_loaded_into_the_trunk_alone(tmp_path: Path) -> None:
    run = open_run(plain_model())
    arguments: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    with training(run, **SETTINGS) as optimizer:
        trainer = trainer_of(run.trunk, optimizer, tmp_path, callbacks=[StopAt(6)], **arguments)
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        with pytest.raises(BadInput, match="changed outside of the PoolOptimizer"):
            trainer.evaluate()
        with pytest.raises(BadInput, match="changed outside of the PoolOptimizer"):
            trainer.save_model(str(tmp_path / "best"))
        assert not list((tmp_path / "best").glob("*.safetensors"))
        # As the error says, this goes back to it.
        state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
        optimizer.load_state_dict(state)
        trainer.evaluate()
        assert run.step == 2
        trainer.save_model(str(tmp_path / "best"))
    best = [
        AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("best", "checkpoint-2")
    ]
    assert torch.equal(*(one.model.layers[1].mlp.experts.down_proj for one in best))
