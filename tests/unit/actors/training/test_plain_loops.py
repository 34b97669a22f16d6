"""Loops as users write them, with a trunk and PoolOptimizer, against the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from tests.helpers.models.architectures import tiny_model
from tests.helpers.training.in_process import InProcessRun, differences, open_run, training

STEPS = 6
Loop = Callable[[Any, torch.optim.Optimizer], list[float]]


def model_of(name: str = "mixtral", **overrides: Any) -> Any:
    model = tiny_model(name, dtype=torch.float64, **overrides)
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model.train()


def batch(number: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, 96, (rows, 9), generator=generator)


def loss_of(model: Any, number: int, rows: int = 2) -> Tensor:
    ids = batch(number, rows)
    # The models' own losses are computed in float32.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def clipped(model: Any, optimizer: torch.optim.Optimizer, **clip: Any) -> list[float]:
    norms = []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, **clip)))
        optimizer.step()
    return norms


def in_two_calls(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    norms = []
    for number in range(STEPS):
        loss_of(model, number).backward()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        norms.append(norm := torch.nn.utils.get_total_norm(grads))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        model.zero_grad()
    return [float(norm) for norm in norms]


def accumulating(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    losses = []
    for number in range(STEPS):
        for part in range(3):
            loss = loss_of(model, 3 * number + part) / 3
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def dropping(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for number in range(STEPS):
        loss = loss_of(model, number)
        loss.backward()
        if number % 3 == 1:
            model.zero_grad()  # the pool hears of it at the next forward pass
            continue
        if number % 3 == 2:
            optimizer.zero_grad()
            loss_of(model, number + 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def scaling(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    norms = []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        if number == 2:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if number != 2:
            norms.append(float(norm))
        scaler.step(optimizer)
        scaler.update()
        norms.append(scaler.get_scale())
    return norms


def by_closure(model: Any, optimizer: Any) -> list[float]:
    def closure(number: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        return loss

    return [optimizer.step(lambda n=n: closure(n)).item() for n in range(STEPS)]


def by_hand(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    norms = []
    for number in range(STEPS):
        loss_of(model, number).backward()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        norms.append(sum(float(one.norm()) ** 2 for one in grads) ** 0.5)
        for one in model.parameters():
            one.grad.data.mul_(0.25)
            one.grad = one.grad * 2.0
            one.grad /= 3
        optimizer.step()
        optimizer.zero_grad()
    return norms


def grouped(model: Any) -> list[dict[str, Any]]:
    """Biases and norms without decay, experts with a rate of their own."""
    found: dict[str, list[Any]] = {"biases": [], "experts": [], "others": []}
    for name, one in model.named_parameters():
        kind = "biases" if "bias" in name or "norm" in name else "others"
        found["experts" if kind == "others" and ".experts." in name else kind].append((name, one))
    return [
        {"params": found["others"]},
        {"params": found["biases"], "weight_decay": 0.0},
        {"params": found["experts"], "lr": 3e-3},
    ]


def compared(
    loop: Loop,
    name: str = "mixtral",
    *,
    params: Callable[[Any], Any] | None = None,
    optimizer: str = "AdamW",
    own: Mapping[str, Any] | None = None,
    **settings: Any,
) -> InProcessRun:
    """Run a loop with the plain model and with a trunk, and compare all that comes out."""
    plain = model_of(name)
    start = copy.deepcopy(plain)
    cls = getattr(torch.optim, optimizer)
    wanted = loop(plain, cls(plain.parameters() if params is None else params(plain), **settings))
    run = open_run(start)
    with training(run, params, optimizer=optimizer, **settings, **(own or {})) as trained:
        found = loop(run.trunk, trained)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert max(differences(plain, run).values()) < 1e-12
    changed = differences(start, run)
    assert min(change for name, change in changed.items() if "experts" in name) > 1e-5
    return run


@pytest.mark.parametrize(
    "loop",
    [clipped, in_two_calls, accumulating, dropping, scaling, by_closure, by_hand],
    ids=lambda loop: loop.__name__,
)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_loop_has_the_result_of_the_plain_model(loop: Loop, name: str) -> None:
    compared(loop, name, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_in_every_form(foreach: bool | None) -> None:
    loop = partial(clipped, foreach=foreach, error_if_nonfinite=True)
    run = compared(loop, optimizer="SGD", lr=0.1, momentum=0.9)
    assert run.asked == STEPS


def test_groups_by_name_with_biases_of_experts_and_a_schedule() -> None:
    compared(accumulating, "gpt_oss", params=grouped, lr=1e-2, weight_decay=0.3)


def test_clipping_by_the_optimizer_itself() -> None:
    plain = model_of()
    run = open_run(plain)
    wanted = clipped(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    assert min(wanted) > 0.5  # it is active
    with training(run, lr=1e-2, max_grad_norm=0.5) as optimizer:
        norms = []
        for number in range(STEPS):
            loss_of(run.trunk, number).backward()
            optimizer.step()
            assert all(one.grad is None for one in run.trunk.parameters())
            norms.append(optimizer.grad_norm)
    assert norms == pytest.approx(wanted, rel=1e-12)
    assert max(differences(plain, run).values()) < 1e-12
