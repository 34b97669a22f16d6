"""Parameter groups and models of PoolOptimizer: what is trained, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.models.training.pool_gradient import PoolGradient
from moesaic.proto.errors import BadInput, InternalError
from tests.helpers.training.in_process import InProcessRun, differences, open_run, training
from tests.helpers.training.small_models import DOWN, LR, UP, learn, loss_of


def frozen(model: Any) -> None:
    for name, one in model.named_parameters():
        one.requires_grad_("layers.0.mlp.experts" not in name and "down_proj" not in name)


def test_frozen_tensors_of_experts_are_neither_counted_nor_updated(start: Any) -> None:
    plain = copy.deepcopy(start)
    frozen(plain)
    other = torch.optim.AdamW([one for one in plain.parameters() if one.requires_grad], **LR)
    run = open_run(start)
    frozen(run.trunk)
    with training(run, **LR) as optimizer:
        assert set(optimizer.trained.experts) == {1}
        assert set(optimizer.trained.experts[1]) == {"up"}
        for seed in range(3):
            norms = []
            for model, used in ((plain, other), (run.trunk, optimizer)):
                loss_of(model, seed).backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
                used.step()
                used.zero_grad()
            assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert max(differences(plain, run).values()) < 1e-7
    assert differences(start, run)[DOWN.format(1)] == 0.0


def test_only_experts_or_only_the_trunk(start: Any) -> None:
    for experts in (True, False):
        run = open_run(start)
        for name, one in run.trunk.named_parameters():
            one.requires_grad_((".experts." in name) == experts)
        with training(run, **LR) as optimizer:
            assert bool(optimizer.trained.experts) == experts
            assert bool(optimizer.trained.trunk) != experts
            for seed in range(2):
                learn(run, seed)
                learn(run, seed + 5)
                optimizer.step()
        changed = {name for name, change in differences(start, run).items() if change}
        assert changed == {n for n, _ in start.named_parameters() if (".experts." in n) == experts}
        assert run.step == 2


def test_experts_that_no_group_has(start: Any, run: InProcessRun) -> None:
    def trunk_alone(model: Any) -> list[nn.Parameter]:
        return [one for name, one in model.named_parameters() if ".experts." not in name]

    with training(run, trunk_alone, **LR) as optimizer:
        learn(run)
        with pytest.raises(BadInput, match="the optimizer does not train it: hosts know no norm"):
            torch.nn.utils.clip_grad_norm_(run.trunk.parameters(), 1.0)
        optimizer.zero_grad()
        run.trunk.zero_grad()
        learn(run)
        torch.nn.utils.clip_grad_norm_(trunk_alone(run.trunk), 1.0)
        optimizer.step()
        assert run.step == 1
    assert {n for n, change in differences(start, run).items() if change == 0.0} == {
        name.format(layer) for name in (UP, DOWN) for layer in (0, 1)
    }


def test_what_is_thawed_later_is_refused(run: InProcessRun) -> None:
    run.trunk.lm_head.weight.requires_grad_(False)
    with training(run, lambda model: list(model.parameters()), **LR) as optimizer:
        run.trunk.lm_head.weight.requires_grad_(True)
        learn(run)
        with pytest.raises(BadInput, match=r"lm_head.weight did not require gradients when"):
            optimizer.step()


def test_a_sparse_gradient_is_refused(run: InProcessRun) -> None:
    run.trunk.model.embed_tokens.sparse = True
    with training(run, **LR) as optimizer:
        learn(run)
        with pytest.raises(BadInput, match=r"embed_tokens.weight is sparse.*sparse=False"):
            optimizer.step()


def test_groups_carry_the_hyperparameters_of_the_class(run: InProcessRun) -> None:
    with training(run, optimizer="SGD", momentum=0.9, lr=0.5) as optimizer:
        (group,) = optimizer.param_groups
        plain = torch.optim.SGD([torch.zeros(1)]).param_groups[0]
        how = {"foreach", "fused", "differentiable"}
        assert group.keys() == plain.keys() - how
        assert (group["lr"], group["momentum"]) == (0.5, 0.9)
        group["lr"] = torch.tensor(0.25)
        group["momentum"] = -1.0
        learn(run)
        with pytest.raises(BadInput, match=r"momentum: -1.0"):
            optimizer.step()
        group["momentum"] = 0.0
        with pytest.raises(BadInput, match=r"momentum: 0\.0.* changes which state"):
            optimizer.step()
        group["momentum"] = 0.5
        optimizer.step()
        with pytest.raises(BadInput, match="give all groups to PoolOptimizer"):
            optimizer.add_param_group({"params": [torch.zeros(1)]})


def alien() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, 3))


PARAMS: dict[str, Callable[[Any], Any]] = {
    r"params\[0\]: number 0: a tensor of shape \(2, 3\) that is no parameter": lambda _: [alien()],
    r"params\[1\]: number 0, p: a tensor of shape": lambda m: [
        {"params": [m.lm_head.weight]},
        {"params": [("p", alien())]},
    ],
    "number 0: it is the result of a computation": lambda m: [m.lm_head.weight * 2],
    "number 0: str: it must be a parameter": lambda _: ["lm_head.weight"],
    r"params\[1\]: Parameter: it must be a dict": lambda m: [
        {"params": m.lm_head.weight},
        m.lm_head.weight,
    ],
    "params: one tensor": lambda m: m.lm_head.weight,
    r"params: \[\]": lambda _: [],
    r"params\[0\]: weight_dekay: optimizer AdamW has no such hyperparameter": lambda m: [
        {"params": m.parameters(), "weight_dekay": 0.0}
    ],
    r"params\[0\]: optimizer AdamW: lr: 'high'": lambda m: [
        {"params": m.parameters(), "lr": "high"}
    ],
    "none of them requires gradients": lambda m: [m.lm_head.weight.requires_grad_(False)],
}


@pytest.mark.parametrize("message", PARAMS)
def test_params_that_cannot_be_trained(run: InProcessRun, message: str) -> None:
    with pytest.raises(BadInput, match=message), training(run, PARAMS[message], **LR):
        pass
    run.trunk.requires_grad_(True)
    with training(run, **LR):  # nothing was left behind
        pass


def test_nothing_to_train(run: InProcessRun) -> None:
    run.trunk.requires_grad_(False)
    with pytest.raises(BadInput, match=r"call model.requires_grad_\(True\)"), training(run):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"not_finite": "ignore"}, 'not_finite: .ignore.: it must be "stop" or "skip"'),
        ({"max_grad_norm": -1.0}, "max_norm -1.0 must be"),
        ({"optimizer": "LBFGS"}, "LBFGS cannot be used"),
        ({"optimizer": "AdamW", "momentum": 0.9}, "momentum: 0.9: there is no such"),
    ],
)
def test_options_that_cannot_be_used(
    run: InProcessRun, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message), training(run, **options):
        pass


def test_a_model_that_is_wrapped_or_not_open_is_refused(start: Any, run: InProcessRun) -> None:
    class FSDPMixtral(type(run.trunk)):  # what fully_shard makes of a class
        pass

    with pytest.raises(BadInput, match="DataParallel: give the model that the cluster has opened"):
        RunOptimizer(nn.DataParallel(run.trunk), run.open)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="it is not open for training"):
        RunOptimizer(start, run.open)
    trunk = copy.copy(run.trunk)
    trunk.__class__ = FSDPMixtral
    with pytest.raises(BadInput, match="FSDPMixtral: its parameters are sharded"):
        RunOptimizer(trunk, run.open)


def test_copies_of_data_parallel_are_refused(run: InProcessRun) -> None:
    with training(run, **LR):
        replica = run.trunk._replicate_for_data_parallel()
        with pytest.raises(BadInput, match="set CUDA_VISIBLE_DEVICES to one GPU"):
            replica(torch.ones(1, 3).long())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_divide_is_refused(run: InProcessRun, weight: float) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        with pytest.raises(BadInput, match=f"weight: {weight}: it must be finite and not negative"):
            optimizer.step(weight=weight)
        with pytest.raises(BadInput, match="no worker has a weight above 0"):
            optimizer.step(weight=0.0)
        optimizer.step(weight=2.0)
        assert run.step == 1


def test_a_second_optimizer(start: Any, run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        with pytest.raises(BadInput, match="another PoolOptimizer trains it"):
            RunOptimizer(run.trunk, run.open)
        learn(run)
        optimizer.step()
        for one in run.trunk.lm_head.parameters():
            one.grad = torch.ones_like(one)
        torch.optim.SGD(run.trunk.lm_head.parameters(), lr=0.1).step()
        with pytest.raises(BadInput, match=r"lm_head.weight: changed outside of the PoolOptimizer"):
            loss_of(run.trunk)
        with pytest.raises(BadInput, match=r"lm_head.weight: changed outside of the PoolOptimizer"):
            optimizer.step()


def test_closing_gives_the_trunk_back_and_frees_everything(run: InProcessRun) -> None:
    with training(run, **LR) as optimizer:
        learn(run)
        assert isinstance(run.trunk.get_parameter(UP.format(0)).grad, PoolGradient)
    assert run.closed
    assert run.trunk.get_parameter(UP.format(0)).grad is None
    optimizer.close()
    for used in (optimizer.step, optimizer.state_dict, optimizer.zero_grad):
        with pytest.raises(BadInput, match="is closed; make a new one"):
            used()
    assert not run.trunk._forward_pre_hooks and not run.trunk.model._forward_pre_hooks
    run.learned = lambda _: None
    gone = weakref.ref(optimizer)
    del optimizer, used
    again = RunOptimizer(run.trunk, run.open, **LR)
    again.close()
    gc.collect()
    assert gone() is None


def test_a_run_that_does_not_open_leaves_the_trunk_free(run: InProcessRun) -> None:
    def fail(*_: object) -> Any:
        raise InternalError("no hosts")

    with pytest.raises(InternalError, match="no hosts"):
        RunOptimizer(run.trunk, fail)
    with training(run, **LR):
        pass
