"""Optimizers by name: what is accepted, which form is used, what they keep."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.kernels.training.update_rules import OwnerBytes, UpdateRule, state_of
from moesaic.proto.errors import BadInput


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("Adamw", {}, r"Adamw: torch.optim has no such class; choose one of .*AdamW.*SGD$"),
        ("lr_scheduler", {}, "no such class"),
        ("Optimizer", {}, "base class"),
        ("LBFGS", {}, "couples all tensors"),
        ("SparseAdam", {}, "sparse gradients"),
        ("AdamW", {"momentum": 0.9}, "momentum: 0.9: there is no such hyperparameter; .*betas"),
        ("AdamW", {"fused": False}, "fused: False: there is no such"),
        ("AdamW", {"lr": -1.0}, r"lr: -1.0: .*Invalid learning rate"),
        ("AdamW", {"lr": math.nan}, "lr: nan must be like the default, 0.001"),
        ("AdamW", {"weight_decay": math.inf}, "weight_decay: inf must be like"),
        ("AdamW", {"lr": "0.1"}, "lr: '0.1' must be like"),
        ("AdamW", {"lr": True}, "lr: True must be like"),
        ("AdamW", {"betas": 0.9}, r"betas: 0.9 must be like the default, \(0.9, 0.999\)"),
        ("AdamW", {"betas": [0.9]}, r"betas: \[0.9\] must be like"),
        ("AdamW", {"eps": 1e-9, "betas": [0.9, 1.5]}, r"AdamW: betas: \(0.9, 1.5\): .*index 1"),
        ("AdamW", {"amsgrad": 1}, "amsgrad: 1 must be like"),
        ("SGD", {"nesterov": True}, "nesterov: True: .*requires a momentum"),
        ("Adafactor", {"eps": (None, "x")}, r"eps: \(None, 'x'\) must be like"),
        ("Muon", {"ns_steps": 1.5}, "ns_steps: 1.5: TypeError"),
        ("Muon", {"ns_steps": 1000}, "ns_steps: 1000: .*less than 100"),
        ("Muon", {"adjust_lr_fn": "no"}, "adjust_lr_fn: 'no': .*not supported"),
    ],
)
def test_what_cannot_be_used_is_named(
    name: str, hyperparameters: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        UpdateRule(name, **hyperparameters)


def test_settings_of_a_step_replace_hyperparameters_of_that_step_alone() -> None:
    rule = UpdateRule("AdamW", lr=0.1, betas=[0.8, 0.9])
    assert rule.values({"lr": 0.2})["lr"] == 0.2
    assert rule.values({})["lr"] == 0.1
    assert rule.values({"betas": [0.5, 0.6]})["betas"] == (0.5, 0.6)
    with pytest.raises(BadInput, match=r"lr: -0.5: .*Invalid learning rate"):
        rule.values({"lr": -0.5})


@pytest.mark.parametrize(
    ("name", "settings"), [("SGD", {"momentum": 0.9}), ("AdamW", {"amsgrad": True})]
)
def test_settings_that_change_what_is_kept_are_refused(
    name: str, settings: dict[str, object]
) -> None:
    with pytest.raises(BadInput, match="changes which state it keeps"):
        UpdateRule(name).values(settings)
    UpdateRule(name, **settings).values(settings)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("AdamW", True), ("Adam", True), ("SGD", True), ("Adagrad", True), ("NAdam", None)],
)
def test_fused_forms_are_used_where_there_is_one(name: str, fused: bool | None) -> None:
    group = UpdateRule(name).optimizer_of(torch.zeros(2, 2)).param_groups[0]
    assert (group.get("fused"), group["foreach"]) == (fused, None if fused else False)


def test_an_optimizer_that_does_not_take_a_shape_is_an_error() -> None:
    rule = UpdateRule("Muon")
    with pytest.raises(BadInput, match=r"Muon: 1 dimensions: .*only supports 2D"):
        rule.state_forms(1, torch.float32)
    with pytest.raises(BadInput, match=r"Muon: shape \(3,\): .*only supports 2D"):
        rule.optimizer_of(torch.zeros(3))


ALL = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam"]
ALL += ["RAdam", "RMSprop", "Rprop", "SGD"]
WITH_MORE_STATE: dict[str, dict[str, object]] = {
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in ALL
        for shape in ((), (37,), (64, 48), (3, 16, 5))
        if name != "Muon" or len(shape) == 2
    ],
)
def test_planned_bytes_are_those_that_are_kept(
    dtype: torch.dtype, name: str, shape: tuple[int, ...]
) -> None:
    rule = UpdateRule(name, **WITH_MORE_STATE.get(name, {}))
    master = torch.ones(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = rule.optimizer_of(master)
    master.grad = torch.ones_like(master)
    optimizer.step()
    found = {kind: tensor.nbytes for kind, tensor in state_of(optimizer).items()}
    planned = rule.bytes_of(shape, dtype)
    assert planned == OwnerBytes(master.nbytes, master.nbytes, sum(found.values()))
    assert planned.total == 2 * master.nbytes + planned.state


@pytest.mark.parametrize(
    ("name", "hyperparameters", "dtype", "per_parameter"),
    [
        ("AdamW", {}, torch.float32, 4 + 4 + 8),
        ("AdamW", {}, torch.bfloat16, 4 + 4 + 8),
        ("AdamW", {}, torch.float16, 4 + 4 + 8),
        ("AdamW", {}, torch.float64, 8 + 8 + 16),
        ("AdamW", {"amsgrad": True}, torch.float32, 4 + 4 + 12),
        ("SGD", {}, torch.float32, 4 + 4),
        ("SGD", {"momentum": 0.9}, torch.bfloat16, 4 + 4 + 4),
        ("Muon", {}, torch.float32, 4 + 4 + 4),
        ("Adafactor", {}, torch.bfloat16, 4 + 4),
    ],
)
def test_bytes_of_an_owner_per_parameter(
    name: str, hyperparameters: dict[str, object], dtype: torch.dtype, per_parameter: int
) -> None:
    rule = UpdateRule(name, **hyperparameters)
    found = rule.bytes_of((1024, 1024), dtype).total / 1024**2
    assert found == pytest.approx(per_parameter, rel=0.01)
