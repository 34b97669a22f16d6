"""Tests with Prometheus' own programs: `PROMETHEUS` is the folder of `prometheus` and `promtool`,
or they are on the PATH. Debian's package `prometheus`, unpacked without its services, has both."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> Path:
    """A program of Prometheus; the test is skipped where it is not installed."""
    folder = os.environ.get("PROMETHEUS")
    if folder is not None:
        found = Path(folder) / name
        assert found.is_file(), f"PROMETHEUS={folder}: there is no {name}"
        return found
    on_path = shutil.which(name)
    if on_path is None:
        pytest.skip(f"{name} is not on the PATH; set PROMETHEUS to the folder that has it")
    return Path(on_path)


@pytest.fixture(scope="session")
def promtool() -> Path:
    return program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    return program("prometheus")
