"""The model that hosts of these tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pool.serving import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))
