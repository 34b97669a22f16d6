"""A pool of two hosts that may become one to four; every test leaves two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import Client
from moesaic.handle import Cluster
from tests.helpers.processes.live import running
from tests.integration.conftest import save_model


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("scaled"), "mixtral")


@pytest.fixture(scope="package")
def pool(folder: Path) -> Iterator[Cluster]:
    group = {"count": 2, "min_count": 1, "max_count": 4, "num_cpus": 1, "threads": 1, "slots": 24}
    # Only hands scale here.
    by_hand = {"up_after_s": 3600, "down_after_s": 3600}
    with running(
        "scaled", folder, hosts=[group], balance={"lease_s": 3}, autoscale=by_hand
    ) as cluster:
        yield cluster


@pytest.fixture
def client(pool: Cluster) -> Iterator[Client]:
    with Client(pool.url or "") as client:
        yield client
