"""With ``exact`` the result has the same bits, whoever computes what: float32, to the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training.outcomes import Outcome, outcome_of
from tests.integration.conftest import save_model

OTHERS: dict[str, dict[str, Any]] = {
    "two workers": {"workers": 2},
    "a worker without microbatches": {"workers": 7},
    "uneven parts": {"workers": 2, "deal": lambda number, workers: [[4], [0, 1, 2, 3]][number]},
    "another order": {"workers": 2, "deal": lambda number, workers: [[3, 1], [4, 0, 2]][number]},
    "three hosts": {"hosts": 3},
    "two replicas": {"hosts": 2, "replicas": 2},
    "three replicas": {"hosts": 3, "replicas": 3},
    "lent": {"hosts": 2, "borrows": True},
    "redundancy": {"hosts": 2, "redundancy": 1},
    "all at once": {
        **{"workers": 3, "hosts": 3, "replicas": 2},
        **{"borrows": True, "redundancy": 1},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    """By one worker with one host, and nothing lent."""
    return outcome_of(folder, hosts=1)


@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS.keys())
def test_who_computes_what_does_not_change_a_bit(
    folder: Path, alone: Outcome, how: dict[str, Any]
) -> None:
    assert outcome_of(folder, **how).differences(alone) == []
