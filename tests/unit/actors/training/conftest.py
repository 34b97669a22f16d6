"""A small model, and a run over a trunk of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.models.architectures import tiny_model
from tests.helpers.training.in_process import InProcessRun, open_run


@pytest.fixture(scope="module")
def start() -> Any:
    model = tiny_model("mixtral", dtype=torch.float64).train()
    model.set_experts_implementation("eager")
    return model


@pytest.fixture
def run(start: Any) -> InProcessRun:
    return open_run(start)
