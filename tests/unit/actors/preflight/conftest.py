"""The model's folder that a preflight looks into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.models.tiny import tiny_mixtral, tiny_tokenizer


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    tiny_mixtral().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return shutil.copytree(whole, tmp_path / "m")
