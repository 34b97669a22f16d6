"""What all tests of upcycling begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.models.dense import make_dense


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint, which no test changes."""
    return make_dense(tmp_path_factory.mktemp("dense") / "tiny")
