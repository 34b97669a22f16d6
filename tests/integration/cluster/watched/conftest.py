"""A pool of two hosts with emulated devices and a router service, which logs all that it can."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from moesaic import Client
from moesaic.handle import Cluster
from tests.helpers.processes.listening import listening
from tests.helpers.processes.live import running
from tests.integration.conftest import save_model


@pytest.fixture(scope="package")
def listening_before() -> set[tuple[str, str]]:
    """Where this process listened before the pool started."""
    return listening([psutil.Process()])


@pytest.fixture(scope="package")
def pool(
    tmp_path_factory: pytest.TempPathFactory, listening_before: set[tuple[str, str]]
) -> Iterator[Cluster]:
    model = save_model(tmp_path_factory.mktemp("watched"), "mixtral")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_LOG", "debug")
        patch.setenv("MOESAIC_LOG_FORMAT", "json")
        hosts = [{"count": 2, "slots": 16, "emulate": {"call_us": 3000, "row_us": 100}}]
        with running(
            "watched", model, hosts=hosts, router={"port": 0}, balance={"lease_s": 4}
        ) as cluster:
            patch.undo()
            yield cluster


@pytest.fixture
def client(pool: Cluster) -> Iterator[Client]:
    with Client(pool.url or "") as client:
        yield client
