"""The page of a cluster on Ray: the map is what `moesaic experts` says, and its buttons act."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from moesaic import Client
from moesaic.handle import Cluster
from moesaic.page_address import page_address
from moesaic.session import need_session
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    running,
    text_of,
    wait_replaced,
    wait_until,
)
from tests.integration.conftest import save_model
from tests.with_browser.browser import Browser

pytestmark = [*ON_RAY, pytest.mark.browser]


@pytest.fixture(scope="module")
def pool(is_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = save_model(tmp_path_factory.mktemp("model"), "mixtral")
    models = [{"name": "m", "path": str(folder), "replicas": 2}]
    group = {"count": 2, "min_count": 2, "max_count": 3, "slots": 64}
    with running("page", folder, models=models, hosts=[group]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def browser(pool: Cluster) -> Iterator[Browser]:
    """It ends before the cluster, which must leave no process behind."""
    made = Browser()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def page(browser: Browser, pool: Cluster) -> Browser:
    """The page as `moesaic page` opens it."""
    browser.open(page_address(need_session(pool.name)))
    browser.wait("document.getElementById('key-words').textContent === 'operator'")
    return browser


def experts(pool: Cluster) -> dict[str, Any]:
    """What `moesaic experts --json` prints, in the form of the page."""
    return {
        f"{one.model}/{one.layer}/{one.expert}": [
            one.assignments_per_s.over_10_s,
            {replica.host: replica.share for replica in one.replicas},
        ]
        for one in pool.experts()
    }


def consent(page: Browser) -> None:
    page.do("click", at="#ask-yes")
    page.wait("!document.getElementById('ask').open", 60.0)


def test_the_map_is_what_experts_says(page: Browser, pool: Cluster) -> None:
    with Client(pool.url or "") as client:
        text_of(client, "m", 20)
    page.wait("window.moesaic.map.model.total > 0")

    def same() -> bool:
        # The load falls once a second, in between the two questions, too.
        return page.run("window.moesaic.experts('m')") == experts(pool)

    wait_until(same)
    assert any(load for load, _ in experts(pool).values())
    assert page.do("problems") == []


def test_hosts_and_engines_are_those_of_status(page: Browser, pool: Cluster) -> None:
    page.wait("document.querySelectorAll('#engines tr').length === 1")
    hosts = page.run("[...document.querySelectorAll('#hosts tr')].map((row) => row.dataset.key)")
    assert hosts == [host.name for host in pool.status().hosts]
    replicas = page.run(
        "[...document.querySelectorAll('#hosts tr')].map((row) => row.children[2].textContent)"
    )
    assert replicas == [str(one.replicas) for one in processes_of(pool).values()]
    assert page.do("text", at="#cluster") == pool.name


def test_a_wrong_key_changes_nothing(browser: Browser, pool: Cluster) -> None:
    browser.open(f"{pool.monitoring}/#key=wrong")
    browser.wait("document.getElementById('key-words').textContent.includes('wrong key')")
    before = pool.history()
    status = browser.run(
        "fetch('actions/drain', {method: 'POST', body: '{\"host\": \"host-1\"}', headers: "
        "{'Content-Type': 'application/json', Authorization: 'Bearer wrong'}})"
        ".then((answer) => answer.status)"
    )
    assert status == 401
    assert [one.id for one in pool.history()] == [one.id for one in before]


def test_pin_and_unpin(page: Browser, pool: Cluster) -> None:
    page.run("window.moesaic.map.choose(0, 3)")
    layer = page.run("window.moesaic.map.model.layers[0]")
    page.do("click", at="#pin")
    page.do("choose", at="#ask select", value="host-1")
    consent(page)
    wait_until(lambda: pool.experts("m", layer)[3].pinned_to == ["host-1"])
    assert pool.history()[-1].initiator == "page"
    page.wait("document.getElementById('chosen-words').textContent.includes('pinned to host-1')")
    page.do("click", at="#unpin")
    consent(page)
    wait_until(lambda: pool.experts("m", layer)[3].pinned_to == [])


def test_rebalance_shows_the_plan(page: Browser, pool: Cluster) -> None:
    page.do("click", at="#rebalance")
    page.wait("!document.getElementById('ask-body').textContent.includes('looks for')", 60.0)
    moves = len(pool.plan().moves)
    title = page.do("text", at="#ask-title")
    assert title == ("Carry out this plan?" if moves else "Rebalance")
    page.do("click", at="#ask-no")


def test_a_drain_that_cannot_be_and_one_that_can(page: Browser, pool: Cluster) -> None:
    page.do("click", at="[data-key='host-1'] button")
    consent(page)
    wait_until(lambda: "host-1" in pool.status().balancing.draining_hosts)
    page.wait("document.querySelector(\"[data-key='host-1'] button\").textContent === 'Undrain…'")
    # The other host would be the last one.
    page.do("click", at="[data-key='host-0'] button")
    page.do("click", at="#ask-yes")
    page.wait("!document.getElementById('ask-problem').hidden", 60.0)
    assert "host-0" in page.do("text", at="#ask-problem")
    page.do("click", at="#ask-no")
    page.do("click", at="[data-key='host-1'] button")
    consent(page)
    wait_until(lambda: not pool.status().balancing.draining_hosts)


def test_a_host_that_dies_is_on_the_timeline(page: Browser, pool: Cluster) -> None:
    before = processes_of(pool)["host-1"].pid
    os.kill(before, signal.SIGKILL)
    page.wait(
        "document.getElementById('events').textContent.includes('host-1 is replaced by a new')",
        60.0,
    )
    wait_replaced(pool, "host-1", before)
    page.wait("[...document.querySelectorAll('#hosts .dot')].every((dot) => dot.matches('.good'))")


def test_scale(page: Browser, pool: Cluster) -> None:
    page.wait("!document.getElementById('scale').disabled")
    page.do("click", at="#scale")
    page.do("fill", at="#ask [name=hosts]", value="4")
    page.do("click", at="#ask-yes")
    page.wait("!document.getElementById('ask-problem').hidden", 60.0)
    assert "from 1 to 3" in page.do("text", at="#ask-problem")
    page.do("fill", at="#ask [name=hosts]", value="3")
    consent(page)
    page.wait("document.querySelectorAll('#hosts tr').length === 3", 60.0)
    wait_until(lambda: len(processes_of(pool)) == 3, 120.0)
    assert pool.status().scaling.recent[-1].initiator == "page"
    assert page.do("problems") == []
