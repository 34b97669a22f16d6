"""PoolOptimizer's state, checkpoints, and weights that others have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.proto.errors import BadInput, CheckpointError
from tests.helpers.training.in_process import InProcessRun, differences, open_run, training
from tests.helpers.training.small_models import LR, learn, loss_of, plain_steps


def test_a_state_says_where_it_is(run: InProcessRun, tmp_path: Path) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        optimizer.step()
        where = {"run": run.run, "step": 1, "restores": 0}
        assert optimizer.state_dict()["pool"] == {**where, "checkpoint": None}
        assert optimizer.state_dict()["state"] == {}
        run.trunk.save_pretrained(tmp_path / "a")
        saved = optimizer.state_dict()
        assert saved["pool"] == {**where, "checkpoint": str(tmp_path / "a")}
        torch.save(saved, tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True) == saved
        learn(run)
        optimizer.step()
        later = optimizer.state_dict()
        assert later["pool"]["checkpoint"] is None  # that of another step
        optimizer.load_state_dict(
            later | {"param_groups": [later["param_groups"][0] | {"lr": 7.0}]}
        )
        assert optimizer.param_groups[0]["lr"] == 7.0 and run.step == 2


def test_a_checkpoint_that_is_being_written_counts_unless_it_fails(
    run: InProcessRun, tmp_path: Path
) -> None:
    with training(run, **LR) as optimizer:

        def checkpoint() -> object:
            return optimizer.state_dict()["pool"]["checkpoint"]

        written = optimizer.save(str(tmp_path / "a"), max_shard_size="1MB")
        assert written.done() and written.result(0) is None
        assert checkpoint() == str(tmp_path / "a")
        saving = optimizer.save(tmp_path / "b", wait=False)
        assert not saving.done() and run.saving is not None
        assert checkpoint() == str(tmp_path / "b")
        with pytest.raises(TimeoutError):
            saving.result(0)
        run.saving.set_exception(CheckpointError("b: cannot be written: the disk is full"))
        with pytest.raises(CheckpointError, match="the disk is full"):
            saving.result(0)
        assert checkpoint() is None
        with torch.no_grad():
            run.trunk.lm_head.weight.add_(1.0)
        with pytest.raises(BadInput, match=r"lm_head.weight: changed outside"):
            optimizer.save(tmp_path / "c", wait=False)


def test_going_back_to_a_checkpoint(start: Any, run: InProcessRun, tmp_path: Path) -> None:
    with training(run, **LR) as optimizer:
        states = []
        for seed in (0, 1):
            learn(run, seed)
            optimizer.step()
            run.trunk.save_pretrained(tmp_path / str(seed))
            states.append(optimizer.state_dict())
        saved, second = states
        learn(run, 5)
        optimizer.load_state_dict(saved)
        assert all(one.grad is None for one in run.trunk.parameters())
        assert optimizer.state_dict()["pool"]["checkpoint"] == str(tmp_path / "0")
        learn(run, 2)
        optimizer.step()
        assert max(differences(plain_steps(start, [0, 2]), run).values()) < 1e-9
        # Step 2 of before is another one than that of now.
        optimizer.load_state_dict(second)
        assert max(differences(plain_steps(start, [0, 1]), run).values()) < 1e-9


def test_states_that_cannot_be_loaded(start: Any, run: InProcessRun) -> None:
    other = open_run(start)
    with training(other, **LR) as optimizer:
        learn(other)
        optimizer.step()
        elsewhere = optimizer.state_dict()
    plain = torch.optim.AdamW(start.parameters()).state_dict()
    with training(run, **LR) as optimizer:
        own = optimizer.state_dict()
        with pytest.raises(BadInput, match="not that of a PoolOptimizer"):
            optimizer.load_state_dict(plain)
        with pytest.raises(
            BadInput, match=rf"of run {other.run} after step 1, and this is run {run.run} after"
        ):
            optimizer.load_state_dict(elsewhere)
        with pytest.raises(BadInput, match=r"its groups have .* make it with the same params"):
            optimizer.load_state_dict(own | {"param_groups": own["param_groups"] * 2})


def test_weights_that_were_loaded_into_the_trunk_alone(start: Any, run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        run.trunk.load_state_dict(run.trunk.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
        for use in (lambda: loss_of(run.trunk), optimizer.step):
            with pytest.raises(BadInput, match="changed outside of the PoolOptimizer, as by load"):
                use()
        with pytest.raises(BadInput, match="changed outside"):
            run.trunk.save_pretrained("nowhere")
        assert not Path("nowhere").exists()


def test_zeroing_in_place_is_refused(run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        with pytest.raises(BadInput, match=r"zero_grad\(set_to_none=False\)"):
            optimizer.zero_grad(set_to_none=False)
        with pytest.raises(BadInput, match=r"aten.zero_"):
            run.trunk.zero_grad(set_to_none=False)
