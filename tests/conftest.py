"""What all tests share: quiet libraries and one thread, so that results do not depend on load."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray stays on loopback; it reads this when it is imported, which some tests do before `up`.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's business.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Before Triton is imported: without a card its kernels run in its interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


# By these words the Makefile finds the files that have tests with a mark.
WORDS = {"alone": r"ON_RAY|mark\.alone", "numeric": r"mark\.numeric"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, words in WORDS.items():
        files = {item.path for item in items if item.get_closest_marker(mark)}
        for file in files:
            if not re.search(words, file.read_text()):
                raise pytest.UsageError(f"{file}: has the mark {mark} without {words} in its text")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def ray_runs_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that are not marked ``alone`` run side by side, and a Ray takes all cores."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and "alone" not in request.keywords:
        assert not ray.is_initialized(), "this test starts Ray and lacks the mark `alone`"
