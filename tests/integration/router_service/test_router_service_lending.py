"""A router service with threads of its own computes what hosts of its machine lend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pool.lending import computed
from tests.helpers.pool.router_services import router_service
from tests.helpers.pool.serving import inputs, save_model
from tests.helpers.pool.transports import settles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("exact", [False, True])
def test_it_computes_itself_what_is_lent(folder: Path, exact: bool) -> None:
    """It learns a model's arithmetic when a client first asks for the model."""
    with router_service(folder, exact=exact, lends=True) as served:
        client, router = served.client(), served.router
        served.answers(client, inputs(5))
        assert settles(lambda: router.progress() > 0 and bool(router._lent_experts.lenders))
        before = computed(served.pool)
        for rows in (1, 3, 17):
            served.answers(client, inputs(rows))
        assert computed(served.pool) == before
        assert router.stats().lent > 0
        served.goes_on()


def test_without_threads_hosts_compute_everything(folder: Path) -> None:
    with router_service(folder) as served:
        served.answers(served.client(), inputs(5))
        assert computed(served.pool) > 0
        assert served.router.stats().lent == 0
