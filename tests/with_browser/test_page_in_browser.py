"""The page over a scripted pool: what it shows, what its buttons do and refuse, and how it looks.

MOESAIC_PICTURES=docs/pictures writes the pictures of docs/page.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.proto.errors import ClusterError, NoAnswer
from tests.helpers.endpoint.scripted_pool import KEY, ScriptedPool
from tests.helpers.paths import ROOT
from tests.with_browser.browser import Browser
from tests.with_browser.page_thread import page_thread

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


@pytest.fixture
def pool() -> ScriptedPool:
    return ScriptedPool(layers=6, experts=16, hosts=4, began=time.time() - 600)


@pytest.fixture
def url(browser: Browser, pool: ScriptedPool) -> Iterator[str]:
    with page_thread(pool) as (found, _):
        yield found
        assert browser.do("problems") == []


def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cell(layer: int, expert: int) -> dict[str, Any]:
    return {"text": f"window.moesaic.map.choose({layer}, {expert})"}


# ---- what it shows ------------------------------------------------------------------------------


def test_the_map_has_every_expert_of_the_pool(
    browser: Browser, pool: ScriptedPool, url: str
) -> None:
    browser.open(url)
    found = browser.run("window.moesaic.experts('kimi-k2')")
    wanted = {
        f"kimi-k2/{key.layer}/{expert}": [
            round(float(pool.load_LE[i, expert]), 1),
            {replica.host: pytest.approx(replica.share, abs=1e-4) for replica in replicas},
        ]
        for i, key in enumerate(pool.keys)
        for expert, replicas in enumerate(pool.layers[key].replicas)
    }
    assert found == wanted
    assert browser.do("text", at="#map-title") == "6 layers × 16 experts"


def test_the_hottest_expert_is_the_brightest_cell_and_the_first_row(
    browser: Browser, pool: ScriptedPool, url: str
) -> None:
    browser.open(url, motion="reduce")
    layer, expert = divmod(int(pool.load_LE.argmax()), pool.experts)
    first = browser.do("text", at="#hottest tr:first-child").split()
    assert first[:2] == [str(layer), str(expert)]
    light = f"""(() => {{
        const {{ _image: image, model }} = window.moesaic.map;
        const light = (at) => image.data[4 * at] + image.data[4 * at + 1] + image.data[4 * at + 2];
        const all = [...model.load.keys()].sort((a, b) => light(b) - light(a));
        return light(all[0]) === light({layer} * model.width + {expert});
    }})()"""
    browser.wait(light)


def test_the_map_follows_the_load(browser: Browser, pool: ScriptedPool, url: str) -> None:
    browser.open(url)
    pool.advance(30.0)
    wanted = round(float(pool.load_LE[2, 3]), 1)
    browser.wait(f"window.moesaic.experts('kimi-k2')['kimi-k2/2/3'][0] === {wanted}")


def test_the_keyboard_chooses_an_expert(browser: Browser, pool: ScriptedPool, url: str) -> None:
    browser.open(url)
    browser.run("document.getElementById('plot').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        browser.do("press", key=key)
    words = browser.do("text", at="#chosen-words")
    assert words.startswith("Layer 1, expert 1: ")
    for replica in pool.layers[pool.keys[1]].replicas[1]:
        assert replica.host in words
    browser.do("press", key="End")
    assert "expert 15" in browser.do("text", at="#chosen-words")


def test_the_pointer_shows_an_expert(browser: Browser, pool: ScriptedPool, url: str) -> None:
    browser.open(url)
    place = browser.run("window.moesaic.map._place")
    position = {"x": place["x"] + 5.5 * place["cw"], "y": place["y"] + 2.5 * place["rh"]}
    browser.do("hover", at="#plot", position=position)
    assert browser.do("text", at="#tip").startswith("layer 2 · expert 5")


def test_the_three_views_have_three_legends(browser: Browser, url: str) -> None:
    browser.open(url)
    seen = set()
    for view in ("load", "replicas", "even"):
        browser.do("click", at=f"[data-view={view}]")
        seen.add((browser.do("text", at="#legend-low"), browser.do("text", at="#legend-high")))
    assert len(seen) == 3


def test_a_controller_that_is_gone_and_a_server_that_ends(
    browser: Browser, pool: ScriptedPool
) -> None:
    with page_thread(pool) as (url, _):
        browser.open(url)
        pool.fails = NoAnswer("the controller is being restarted")
        browser.wait("document.body.dataset.link === 'stale'")
        assert "the controller is being restarted" in browser.do("text", at="#banner")
        assert browser.run("window.moesaic.map.model !== null"), "what was there stays"
        pool.fails = None
        browser.wait("document.body.dataset.link === 'live'")
        assert browser.run("document.getElementById('banner').hidden")
    browser.wait("document.body.dataset.link === 'ended' || document.body.dataset.link === 'lost'")
    assert "connects again" in browser.do("text", at="#banner")


def test_a_pool_without_models(browser: Browser, pool: ScriptedPool, url: str) -> None:
    browser.open(url)
    # As of a controller that serves nothing yet.
    browser.run(
        "(() => { const { feed } = window.moesaic; "
        "for (const name of [...feed.items.keys()]) if (/^(model|load|place|even):/.test(name)) "
        "feed.items.delete(name); feed._onItems(new Set(['model:'])); })()"
    )
    browser.wait("!document.getElementById('map-empty').hidden")
    assert browser.do("text", at="#map-empty") == "The cluster serves no model yet."


# ---- who may act --------------------------------------------------------------------------------


def test_without_the_key_nothing_can_be_done(
    browser: Browser, pool: ScriptedPool, url: str
) -> None:
    browser.open(url)
    assert browser.do("text", at="#key-words") == "read-only"
    enabled = "[...document.querySelectorAll('main button, .tools button')]"
    found = browser.run(
        f"{enabled}.filter((one) => !one.disabled && !one.dataset.view && "
        "!one.classList.contains('plain')).map((one) => one.id)"
    )
    assert found == ["unlock"]
    assert pool.asked == []


def test_the_key_leaves_the_address_at_once_and_stays_in_the_tab(
    browser: Browser, url: str
) -> None:
    browser.open(f"{url}/#key={KEY}")
    browser.wait("document.getElementById('key-words').textContent === 'operator'")
    assert browser.do("address") == f"{url}/"
    assert browser.run("sessionStorage.getItem('moesaic-operator-key')") == KEY
    assert browser.run("localStorage.length") == 0
    browser.do("click", at="#unlock")
    assert browser.do("text", at="#key-words") == "read-only"
    assert browser.run("sessionStorage.getItem('moesaic-operator-key')") is None


def test_a_wrong_key_is_refused_in_words(browser: Browser, pool: ScriptedPool) -> None:
    with page_thread(pool) as (url, _):
        browser.open(f"{url}/#key=wrong")
        browser.wait("document.getElementById('key-words').textContent.includes('wrong key')")
        browser.do("click", at="#unlock")
        browser.do("fill", at="#ask input", value="wrong again")
        browser.do("click", at="#ask-yes")
        browser.wait("!document.getElementById('ask-problem').hidden")
        assert "is not the operator key" in browser.do("text", at="#ask-problem")
        browser.do("fill", at="#ask input", value=KEY)
        browser.do("click", at="#ask-yes")
        browser.wait("document.getElementById('key-words').textContent === 'operator'")
    assert pool.asked == []


# ---- what buttons do ----------------------------------------------------------------------------


@pytest.fixture
def operator(browser: Browser, url: str) -> Browser:
    browser.open(f"{url}/#key={KEY}")
    browser.wait("document.getElementById('key-words').textContent === 'operator'")
    return browser


def consent(browser: Browser) -> None:
    browser.do("click", at="#ask-yes")
    browser.wait("!document.getElementById('ask').open")


def test_a_drain_asks_first_and_can_be_undone(operator: Browser, pool: ScriptedPool) -> None:
    operator.do("click", at="[data-key='host-2'] button")
    assert operator.do("text", at="#ask-title") == "Drain host-2?"
    operator.do("click", at="#ask-no")
    assert pool.asked == []
    operator.do("click", at="[data-key='host-2'] button")
    consent(operator)
    assert pool.asked == [("drain", ("host-2", "page"))]
    assert "has begun" in operator.do("text", at="#said")
    operator.wait(
        "document.querySelector(\"[data-key='host-2'] button\").textContent === 'Undrain…'"
    )
    operator.do("click", at="[data-key='host-2'] button")
    consent(operator)
    assert pool.asked[1:] == [("undrain", ("host-2", "page"))]


def test_a_rebalance_shows_its_plan_first(operator: Browser, pool: ScriptedPool) -> None:
    operator.do("click", at="#rebalance")
    operator.wait("document.getElementById('ask-title').textContent === 'Carry out this plan?'")
    body = operator.do("text", at="#ask-body")
    assert pool.asked == [("plan", (None,))]
    for move in pool.plan().moves:
        assert move.reason in body
    consent(operator)
    assert pool.asked[1:] == [("rebalance", (None, "page"))]


def test_pin_unpin_and_replicate(operator: Browser, pool: ScriptedPool) -> None:
    operator.do("run", **cell(3, 7))
    operator.do("click", at="#pin")
    operator.do("choose", at="#ask select", value="host-1")
    consent(operator)
    operator.wait("!document.getElementById('unpin').disabled")
    assert "pinned to host-1" in operator.do("text", at="#chosen-words")
    operator.do("click", at="#unpin")
    consent(operator)
    operator.wait("document.getElementById('unpin').disabled")
    operator.do("click", at="#replicate")
    operator.do("fill", at="#ask input", value="0")
    operator.do("click", at="#ask-yes")
    assert "replicas:" in operator.do("text", at="#ask-problem")
    operator.do("fill", at="#ask input", value="3")
    consent(operator)
    key = ("kimi-k2", 3, 7)
    assert pool.asked == [
        ("pin", (key, "host-1", "page")),
        ("unpin", (key, "host-1", "page")),
        ("replicate", (key, 3, "page")),
    ]


def test_scale(operator: Browser, pool: ScriptedPool) -> None:
    operator.do("click", at="#scale")
    assert operator.run("document.querySelector('#ask [name=hosts]').value") == "4"
    operator.do("fill", at="#ask [name=hosts]", value="6")
    operator.do("click", at="#ask-yes")
    until(lambda: pool.asked == [("scale", (6, 0, "page"))])


def test_an_error_stays_in_the_dialog_in_the_controllers_words(
    browser: Browser, pool: ScriptedPool
) -> None:
    with page_thread(pool) as (url, _):
        browser.open(f"{url}/#key={KEY}")
        browser.wait("document.getElementById('key-words').textContent === 'operator'")
        browser.do("click", at="[data-key='host-0'] button")
        pool.fails = ClusterError("drain: it would leave no host")
        browser.do("click", at="#ask-yes")
        browser.wait("!document.getElementById('ask-problem').hidden")
        assert browser.do("text", at="#ask-problem") == "drain: it would leave no host"
        assert browser.run("document.getElementById('ask').open")


# ---- for everybody ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [1440, 720])
def test_axe_finds_nothing(browser: Browser, url: str, scheme: str, width: int) -> None:
    browser.open(f"{url}/#key={KEY}", width=width, scheme=scheme)
    browser.wait("document.getElementById('key-words').textContent === 'operator'")
    for steps in ([], ["#rebalance"], ["#scale"], ["[data-key='host-0'] button"]):
        for step in steps:
            browser.do("click", at=step)
        if steps == ["#rebalance"]:
            browser.wait("!document.getElementById('ask-yes').hidden")
        found = browser.do("axe")
        assert found["wrong"] == []
        assert found["passes"] > 10
        if steps:
            browser.do("click", at="#ask-no")


@pytest.mark.parametrize("width", [1440, 1021, 720, 360])
def test_nothing_is_cut_off_at_the_side(browser: Browser, url: str, width: int) -> None:
    browser.open(url, width=width)
    assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0


def test_nothing_moves_while_figures_change(browser: Browser, pool: ScriptedPool, url: str) -> None:
    browser.open(url)
    browser.wait("window.moesaic.feed.events > 1")
    places = (
        "JSON.stringify([...document.querySelectorAll('.panel, .figure, .bar, thead')]"
        ".map((one) => { const box = one.getBoundingClientRect(); "
        "return [one.className, box.x, box.y, box.width, box.height]; }))"
    )
    before, events = browser.run(places), browser.run("window.moesaic.feed.events")
    pool.advance(20.0)
    browser.wait(f"window.moesaic.feed.events > {events + 1}")
    assert browser.run(places) == before


# ---- large --------------------------------------------------------------------------------------


def lively() -> ScriptedPool:
    """61 x 384 experts on 32 hosts, with a past."""
    now = time.time()
    pool = ScriptedPool(began=now - 3600)
    for ago_s, what, level in (
        (1500.0, "is restarting", "bad"),
        (1494.0, "is replaced by a new process", "good"),
    ):
        pool.now = now - ago_s
        pool.happen(what, level, "host-11")
    for ago_s, why, who, moves in (
        (1380.0, "load has shifted", "balancer", 31),
        (610.0, "replicate expert 91 of layer 3", "anna", 2),
    ):
        pool.now = now - ago_s
        pool.begin(why, who, moves, ended_s=24.2)
    pool.now = now - 14
    pool.begin("load has shifted", "balancer", 18)
    pool.now = now
    pool.training = {
        "run": 3, "model": pool.model, "initiator": "anna", "version": 42, "steps": 41,
        "attempt": 1, "workers": 2, "unprotected_tensors": 0, "began": now - 900,
        "owned_tensors": {"host-1": 732, "host-2": 731},
    }  # fmt: skip
    return pool


def test_ten_updates_a_second_of_all_experts(browser: Browser) -> None:
    """Of a server, a browser and a pool that share this machine's cores with other tests."""
    pool = lively()
    with page_thread(pool, drift_s=0.1) as (url, broadcast):
        browser.open(url)
        events = browser.run("window.moesaic.feed.events")
        browser.wait(f"window.moesaic.feed.events >= {events + 20}", 60.0)
        assert broadcast.watching == 1
        assert browser.run("window.moesaic.map.model.load.length") == 61 * 384
        assert browser.do("problems") == []


@pytest.mark.parametrize(
    ("name", "width", "scheme", "at"),
    [
        ("page-1440", 1440, "dark", None),
        ("page-720", 720, "light", None),
        ("page-map", 1440, "dark", ".map"),
    ],
)
def test_pictures(
    browser: Browser, tmp_path: Path, name: str, width: int, scheme: str, at: str | None
) -> None:
    wish = os.environ.get("MOESAIC_PICTURES")
    folder = ROOT / wish if wish else tmp_path
    pool = lively()
    with page_thread(pool, drift_s=0.5) as (url, _):
        browser.open(f"{url}/#key={KEY}", width=width, scheme=scheme, height=1000)
        for step in range(8):
            pool.training = {**(pool.training or {}), "steps": 41 + step, "version": 42 + step}
            browser.wait(f"window.moesaic.feed.items.get('training').steps === {41 + step}")
            events = browser.run("window.moesaic.feed.events")
            browser.wait(f"window.moesaic.feed.events > {events + 2}")
        if at is None and width > 1000:
            place = browser.run("window.moesaic.map._place")
            position = {"x": place["x"] + 155.5 * place["cw"], "y": place["y"] + 22.5 * place["rh"]}
            browser.do("hover", at="#plot", position=position)
        browser.do("shot", path=str(folder / f"{name}.png"), at=at, full=at is None)
    assert (folder / f"{name}.png").stat().st_size > 20_000
