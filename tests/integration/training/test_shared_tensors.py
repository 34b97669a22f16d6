"""A norm that the experts of a layer share: its gradient, its steps, and where it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.cluster.expert_keys import SHARED
from tests.helpers.models.normed import saved_normed
from tests.helpers.models.versions import newest_transformers
from tests.helpers.training.trunks import (
    IDS,
    assert_equal,
    loss_of,
    plain_model,
    training,
)

F64 = torch.float64
pytestmark = newest_transformers  # older ones have no norm behind experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_normed(tmp_path_factory.mktemp("normed"))


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize(
    ("hosts", "replicas", "exact"), [(1, 1, False), (2, 1, True), (3, 2, False)]
)
def test_its_gradient_is_summed_over_all_experts_and_hosts(
    folder: Path, tmp_path: Path, hosts: int, replicas: int, exact: bool, borrows: bool
) -> None:
    plain = plain_model(folder, F64)
    with training(folder, hosts=hosts, replicas=replicas, exact=exact, borrows=borrows) as trunk:
        trunk.begin(exact=exact)
        for ids in (IDS, IDS[:1, 2:]):
            loss_of(plain, ids).backward()
            loss_of(trunk.model, ids).backward()
        found = trunk.gradients(here=borrows and not exact)
        assert {layer for _, layer, expert in found if expert == SHARED} == {0, 1}
        assert_equal(trunk, found, plain, folder, 1e-12)
