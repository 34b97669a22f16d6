"""Whole steps that several trunks make together, each with a router of its own.

One attempt has the microbatches of all of them. Owners sum up what hosts and trunks have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.training.clipping import clip_coefficient
from moesaic.cluster.training.orders import BulkKey, GroupUpdate
from tests.helpers.covering import Case, covering_cases
from tests.helpers.training.steps import DEADLINE_S, Steps, experts_in
from tests.helpers.training.trunks import (
    Trunk,
    assert_near,
    learning_together,
    loss_of,
    plain_model,
    saved,
)

F64 = torch.float64
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
MAX_NORM = 0.5
FACTORS = {
    "workers": [1, 2, 3],
    "hosts": [1, 2, 3],
    "replicas": [1, 2],
    "microbatches": [1, 2],
    "borrows": [False, True],
    "exact": [False, True],
    "redundancy": [0, 1],
}


def excluded(case: Case) -> bool:
    return any(
        "hosts" in case and name in case and case[name] > most
        for name, most in (
            ("replicas", case.get("hosts", 0)),
            ("redundancy", case.get("hosts", 0) - 1),
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def name_of(case: Case) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", covering_cases(FACTORS, excluded, seed=3), ids=name_of)
def test_steps_of_several_trunks_are_those_of_the_plain_model(case: Case, folder: Path) -> None:
    plain = plain_model(folder, F64)
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True, **SETTINGS)
    with learning_together(
        folder,
        case["workers"],
        opened=False,
        hosts=case["hosts"],
        replicas=case["replicas"],
        exact=case["exact"],
        borrows=case["borrows"],
    ) as trunks:
        steps = Steps(trunks[0], redundancy=case["redundancy"])
        steps.open("AdamW", **SETTINGS)
        steps.own()
        for number in range(2):
            batches = batches_of(case, number)
            for ids in (ids for of_worker in batches for ids in of_worker):
                loss_of(plain, ids).backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            found = step_together(steps, trunks, batches, exact=case["exact"])
            assert math.isclose(found, float(norm), rel_tol=1e-12)
            assert_same_models(steps, trunks, plain)


def batches_of(case: Case, step: int) -> list[list[Tensor]]:
    """The microbatches of each worker, which differ in their sizes."""
    generator = torch.Generator().manual_seed(step)
    return [
        [
            torch.randint(3, 96, (1 + number, 4 + worker + number), generator=generator)
            for number in range(case["microbatches"])
        ]
        for worker in range(case["workers"])
    ]


def step_together(
    steps: Steps, trunks: list[Trunk], batches: list[list[Tensor]], *, exact: bool
) -> float:
    """Make a step; return the norm of all gradients before they were clipped."""
    steps.begin(exact=exact)
    for trunk in trunks:
        trunk.model.zero_grad()
        trunk.learning.begin(steps.attempt)
    for turn in zip(*batches, strict=True):
        losses = [loss_of(trunk.model, ids) for trunk, ids in zip(trunks, turn, strict=True)]
        for loss in reversed(losses):
            loss.backward()
    sources = steps.gather()
    for block in steps.blocks:
        sources[block] = ()
    for number, trunk in enumerate(trunks):
        worker = f"worker-{number}"
        given = {key: dict(tensors) for key, tensors in trunk.learning.take().items()}
        parameters = dict(trunk.model.named_parameters())
        for block, names in steps.blocks.items():
            given[block] = {n: g for n in names if (g := parameters[n].grad) is not None}
        for key, tensors in given.items():
            put_gradient(steps, key, worker, tensors)
            sources[key] = (*(sources[key] or ()), worker)
    squares = steps.reduce(sources)
    norm, coefficient, _ = clip_coefficient(squares, MAX_NORM)
    steps.commit({0: GroupUpdate(coefficient, SETTINGS)})
    steps.finish()
    for trunk in trunks[1:]:
        trunk.learning.router.place(trunks[0].pool.placement)
        own = dict(trunk.model.named_parameters())
        with torch.no_grad():
            for name, parameter in trunks[0].model.named_parameters():
                own[name].copy_(parameter)
    return norm


def put_gradient(steps: Steps, key: ExpertKey, worker: str, tensors: Mapping[str, Tensor]) -> None:
    for host in steps.owners[key]:
        given = BulkKey("gradient", key, attempt=steps.attempt, source=worker)
        steps.client.put(steps.entries[host], given, tensors, timeout_s=DEADLINE_S)


def assert_same_models(steps: Steps, trunks: list[Trunk], plain: Any) -> None:
    experts = experts_in(plain)
    held = steps.served()
    assert {key for key, _, _ in held} == experts.keys()
    for (key, host, name), tensor in held.items():
        assert_near(tensor, experts[key][name], 1e-12, f"{name} of {key} on {host}")
    of_plain = dict(plain.named_parameters())
    for name, parameter in trunks[0].model.named_parameters():
        assert_near(parameter.detach(), of_plain[name].detach(), 1e-12, name)
