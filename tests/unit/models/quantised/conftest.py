"""The quantised checkpoints of all tests in this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models.quantising import FORMS, Form


@pytest.fixture(scope="session")
def form(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """Name -> a folder that no test may write to, and what plain transformers holds of it."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("form") / "m"
        return folder, FORMS[name](folder)

    return make
