"""Gradients through the pool at many points of the space that a training run can be in.

| what goes wrong elsewhere | here |
|---|---|
| gradients of experts grow with the number of ranks, or of workers | hosts, replicas, workers |
| accumulation over microbatches counts something twice | microbatches |
| a layer that runs again changes what it has computed | checkpointing, both kinds |
| one form of experts, or one architecture, learns wrongly and nobody has looked | architectures |
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.covering import Case, covering_cases, pairs_of, possible_pairs
from tests.helpers.models.architectures import ADAPTED, ARCHITECTURES, OWN
from tests.helpers.training.trunks import (
    NO_FLOAT64,
    assert_equal,
    enable_checkpointing,
    gradients_of,
    learning_together,
    loss_of,
    plain_model,
    saved,
    tolerance_of,
)

FACTORS = {
    # Gated; bias, clamps and transposed; not gated; adapters: scaled inputs, one expert a token.
    "architecture": ["mixtral", "gpt_oss", "nemotron_h", "llama4_text", "switch_transformers"],
    "hosts": [1, 2, 3, 4],
    "replicas": [1, 2, 3],
    "microbatches": [1, 2, 3, 4],
    "workers": [1, 2, 3],
    "checkpointing": ["none", "reentrant", "non-reentrant"],
    "borrows": [False, True],
    "exact": [False, True],
    "dtype": [torch.float64, torch.float32],
}
EVERY_ARCHITECTURE = [*ARCHITECTURES, *ADAPTED, *OWN]
POINTS = 200
# transformers checkpoints none of its layers.
NO_CHECKPOINTING = ("jetmoe",)

Folder = Callable[[str], Path]


def excluded(case: Case) -> bool:
    """A host has at most one replica of an expert."""
    return "hosts" in case and "replicas" in case and case["replicas"] > case["hosts"]


PAIRWISE = covering_cases(FACTORS, excluded, seed=2)


def random_points() -> list[Case]:
    chance = random.Random(1)
    points = []
    for number in range(POINTS):
        case = {name: chance.choice(values) for name, values in FACTORS.items()}
        case["architecture"] = EVERY_ARCHITECTURE[number % len(EVERY_ARCHITECTURE)]
        case["replicas"] = min(case["replicas"], case["hosts"])
        if case["architecture"] in NO_FLOAT64:
            case["dtype"] = torch.float32
        if case["architecture"] in NO_CHECKPOINTING:
            case["checkpointing"] = "none"
        points.append(case)
    return points


def name_of(case: Case) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def find(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = saved(tmp_path_factory.mktemp("model"), architecture)
        return made[architecture]

    return find


def test_the_cases_cover_each_pair() -> None:
    assert set().union(*map(pairs_of, PAIRWISE)) == possible_pairs(FACTORS, excluded)
    assert not any(map(excluded, PAIRWISE))
    assert len(PAIRWISE) <= 25


@pytest.mark.parametrize("case", PAIRWISE, ids=name_of)
def test_each_pair_of_axes(case: Case, folder: Folder) -> None:
    check(case, folder(case["architecture"]))


@pytest.mark.slow
@pytest.mark.parametrize("case", random_points(), ids=name_of)
def test_random_points_with_every_architecture(case: Case, folder: Folder) -> None:
    check(case, folder(case["architecture"]))


def check(case: Case, folder: Path) -> None:
    """All workers run a microbatch forward before any runs it backward."""
    dtype = case["dtype"]
    plain = plain_model(folder, dtype)
    with learning_together(
        folder,
        case["workers"],
        hosts=case["hosts"],
        replicas=case["replicas"],
        dtype=dtype,
        exact=case["exact"],
        borrows=case["borrows"],
    ) as trunks:
        for trunk in trunks:
            if case["checkpointing"] != "none":
                enable_checkpointing(trunk.model, reentrant=case["checkpointing"] == "reentrant")
            trunk.begin(exact=case["exact"])
        for microbatch in range(case["microbatches"]):
            batches = [ids_of(worker, microbatch) for worker in range(len(trunks))]
            for ids in batches:
                loss_of(plain, ids).backward()
            losses = [loss_of(t.model, ids) for t, ids in zip(trunks, batches, strict=True)]
            for loss in reversed(losses):
                loss.backward()
        tolerance = tolerance_of(case["architecture"], dtype)
        assert_equal(trunks, gradients_of(trunks), plain, folder, tolerance)


def ids_of(worker: int, microbatch: int) -> Tensor:
    """Each microbatch has a size of its own."""
    generator = torch.Generator().manual_seed(10 * worker + microbatch)
    sequences, tokens = 1 + microbatch % 2, 4 + worker + microbatch
    return torch.randint(3, 96, (sequences, tokens), generator=generator)
