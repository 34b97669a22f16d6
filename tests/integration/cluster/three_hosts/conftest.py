"""A pool of three hosts, one of which may be lost; every test leaves it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moesaic import Client
from moesaic.handle import Cluster
from tests.helpers.processes.live import running, wait_whole
from tests.integration.conftest import save_model


@pytest.fixture(scope="package")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = save_model(tmp_path_factory.mktemp("three"), "mixtral")
    balance = {"lease_s": 3, "redundancy": 1}
    with running("three", model, hosts=[{"count": 3}], balance=balance) as cluster:
        yield cluster


@pytest.fixture
def client(pool: Cluster) -> Iterator[Client]:
    wait_whole(pool)
    with Client(pool.url or "") as client:
        yield client
