"""The next process of a killed host starts on the same machine, where its memory is."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.helpers.processes.apart import (
    UNSHARE,
    need_namespaces,
    ray_environment,
    report_of_driver,
)
from tests.integration.conftest import save_model


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_successor_starts_where_the_memory_is(tmp_path: Path) -> None:
    need_namespaces()
    folder = save_model(tmp_path / "model", "mixtral", num_experts_per_tok=4)
    # Ray's sockets lie below it, and their names may have 107 characters.
    with TemporaryDirectory(prefix="moe", dir="/tmp") as ray_dir:
        words = [sys.executable, "-m", "tests.e2e.same_node", str(folder), ray_dir]
        report = report_of_driver([*UNSHARE, *words], ray_environment(tmp_path))
    moves = report["moves"]
    assert len(moves) == 4
    assert len({before for _, before, _, _ in moves}) == 2, "hosts are spread over both nodes"
    for name, before, after, adopted in moves:
        assert after == before, name
        assert adopted > 0, name
