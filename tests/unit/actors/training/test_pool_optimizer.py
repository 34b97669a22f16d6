"""PoolOptimizer's steps: gradients that are lost, bad, dropped or multiplied."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch

from moesaic.models.training.trainable_trunk import trainable_trunk_of
from moesaic.proto.errors import BadExpert, BadInput, StepLost
from tests.helpers.training.in_process import InProcessRun, differences, open_run, training
from tests.helpers.training.small_models import DOWN, LR, UP, learn, loss_of, plain_steps, unchanged


def test_experts_whose_gradients_are_not_finite_are_named_and_nothing_changes(
    start: Any, run: InProcessRun
) -> None:
    with training(run, **LR) as optimizer:
        run.poison = 1, "down"
        learn(run)
        with pytest.raises(BadExpert, match=r"step 1: .* down of expert 0 of layer 1\. Nothing"):
            optimizer.step()
        assert run.step == 0
        with pytest.raises(BadInput, match=r"call step.., or zero_grad"):
            loss_of(run.trunk)
        run.poison = None
        optimizer.zero_grad()
        learn(run)
        optimizer.step()
    assert max(differences(plain_steps(start, [0]), run).values()) < 1e-9


def test_they_are_skipped_with_a_warning(
    start: Any, run: InProcessRun, caplog: pytest.LogCaptureFixture
) -> None:
    with training(run, not_finite="skip", max_grad_norm=1.0, **LR) as optimizer:
        learn(run)
        run.trunk.model.norm.weight.grad[3] = math.nan
        with caplog.at_level(logging.WARNING):
            optimizer.step()
        assert "step 1: gradients are not finite: model.norm.weight. They are" in caplog.text
        assert unchanged(start, run) and run.step == 0 and run.dropped == 1
        assert math.isnan(optimizer.grad_norm or 0.0)
        assert all(one.grad is None for one in run.trunk.parameters())
        learn(run)
        optimizer.step()
        assert run.step == 1 and math.isfinite(optimizer.grad_norm or math.nan)


def test_a_factor_that_is_not_finite(start: Any, run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        for one in trainable_trunk_of(run.trunk).stand_ins:
            assert one.parameter.grad is not None
            one.parameter.grad.mul_(math.nan)
        with pytest.raises(BadExpert, match="the factor by which experts' gradients"):
            optimizer.step()
    assert unchanged(start, run)


@pytest.mark.parametrize("where", ["backward", "squares", "commit"])
def test_a_step_that_is_lost_is_done_again(start: Any, run: InProcessRun, where: str) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        optimizer.step()
        run.lose = where
        with pytest.raises(StepLost, match=f"a host was lost in {where}"):
            learn(run, 1)
            optimizer.step()
        optimizer.zero_grad()
        assert not run.has_gradients
        assert all(one.grad is None for one in run.trunk.parameters())
        learn(run, 1)
        optimizer.step()
        assert run.step == 2
    assert max(differences(plain_steps(start, [0, 1]), run).values()) < 1e-9


def test_a_lost_norm_leaves_no_gradients(run: InProcessRun) -> None:
    with training(run, **LR):
        learn(run)
        run.lose = "squares"
        with pytest.raises(StepLost):
            torch.nn.utils.clip_grad_norm_(run.trunk.parameters(), 1.0)
        assert all(one.grad is None for one in run.trunk.parameters())
        learn(run)  # the forward pass begins the next attempt
        assert run.dropped == 1


def test_a_step_without_gradients_does_nothing(start: Any, run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        optimizer.step()
        assert optimizer.step(lambda: 3.0) == 3.0
        assert run.asked == run.step == run.dropped == 0
        learn(run)
        run.trunk.zero_grad()
        optimizer.step()
        assert run.dropped == 1 and run.step == 0
        assert optimizer.grad_norm is None
    assert unchanged(start, run)


def test_what_is_dropped_must_be_all(run: InProcessRun) -> None:
    with training(run, **LR):
        learn(run)
        run.trunk.model.layers[0].mlp.experts.zero_grad()
        with pytest.raises(BadInput, match=r"of layers \[0\] were dropped, and those of \[1\]"):
            loss_of(run.trunk)
        run.trunk.zero_grad()
        first, second = loss_of(run.trunk), loss_of(run.trunk, 1)
        first.backward()
        run.trunk.zero_grad()
        with pytest.raises(BadInput, match="dropped between two backward passes"):
            second.backward()


def test_nothing_is_added_to_gradients_that_were_multiplied(run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        gradient = run.trunk.get_parameter(UP.format(0)).grad
        gradient.mul_(0.5)
        with pytest.raises(BadInput, match="were multiplied already, so no more"):
            loss_of(run.trunk)
        with torch.no_grad():
            loss_of(run.trunk)  # as in an evaluation
        optimizer.zero_grad()
        with pytest.raises(BadInput, match="belongs to a step that is over"):
            gradient.norm()
        learn(run)
        torch.nn.utils.clip_grad_norm_(run.trunk.parameters(), math.inf)
        with pytest.raises(BadInput, match="were asked for their norm already"):
            run.trunk.model(torch.ones(1, 3).long())  # as a loss of one's own calls it


def test_a_step_that_a_grad_scaler_skips_ends_with_zero_grad(start: Any, run: InProcessRun) -> None:
    """In plain PyTorch the infinite gradients would stay, and all that is added to them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    with training(run, **LR) as optimizer:
        scaler.scale(loss_of(run.trunk) * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (run.step, scaler.get_scale()) == (0, 2.0) and unchanged(start, run)
        with pytest.raises(BadInput, match=r"or zero_grad\(\) if the step was skipped"):
            loss_of(run.trunk)
        with torch.no_grad():
            loss_of(run.trunk)
        optimizer.zero_grad()
        scaler.scale(loss_of(run.trunk)).backward()
        scaler.step(optimizer)
        assert run.step == 1
    assert max(differences(plain_steps(start, [0]), run).values()) < 1e-9


def test_a_layer_without_gradients_is_not_updated(start: Any, run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        run.trunk.model.layers[0].mlp.experts.zero_grad()
        run.trunk.lm_head.weight.grad = None
        optimizer.step()
    changed = {name for name, change in differences(start, run).items() if change}
    kept = {UP.format(0), DOWN.format(0), "lm_head.weight"}
    assert changed == dict(start.named_parameters()).keys() - kept


def test_some_tensors_of_a_layer_alone_are_refused(start: Any, run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        run.trunk.get_parameter(UP.format(1)).grad = None
        with pytest.raises(
            BadInput, match=r"layers.1.*down_proj has a gradient and .*gate_up_proj"
        ):
            optimizer.step()
        run.trunk.get_parameter(UP.format(1)).grad = torch.zeros(1, 1, 1, dtype=torch.float64)
        with pytest.raises(BadInput, match="was replaced by a tensor"):
            optimizer.step()
    assert unchanged(start, run)


def test_factors_within_a_group_must_be_equal(start: Any, run: InProcessRun) -> None:
    def by_layer(model: Any) -> list[dict[str, Any]]:
        first = [one for name, one in model.named_parameters() if "layers.0" in name]
        others = [one for name, one in model.named_parameters() if "layers.0" not in name]
        return [{"params": first}, {"params": others}]

    def scaled(model: Any) -> None:
        for number, layer in enumerate(model.model.layers):
            for one in layer.mlp.experts.parameters():
                one.grad.mul_(1.0 + number)

    with training(run, **LR) as optimizer:
        learn(run)
        scaled(run.trunk)
        with pytest.raises(BadInput, match=r"was multiplied by 1.0, that of .* by 2.0"):
            optimizer.step()
    assert unchanged(start, run)
    plain = copy.deepcopy(start)
    other = torch.optim.SGD(by_layer(plain), lr=0.1)
    loss_of(plain).backward()
    scaled(plain)
    other.step()
    again = open_run(start)
    with training(again, by_layer, optimizer="SGD", lr=0.1) as optimizer:
        learn(again)
        scaled(again.trunk)
        optimizer.step()
    assert max(differences(plain, again).values()) < 1e-9
