"""The page: its files, who may act, and what an action answers; the app over a scripted pool."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from html.parser import HTMLParser
from typing import Any

import httpx
import matplotlib as mpl
import pytest
from matplotlib.colors import to_hex

from moesaic.actors.page import page_app as page_app_module
from moesaic.actors.page.broadcast import Broadcast
from moesaic.actors.page.page_app import FILES
from moesaic.proto.errors import ClusterError, NoAnswer
from tests.helpers.endpoint.page_server import page_app
from tests.helpers.endpoint.scripted_pool import KEY, ScriptedPool

OWN = "http://127.0.0.1:8002"
BEARER = {"Authorization": f"Bearer {KEY}"}
Answer = httpx.Response


@pytest.fixture
def pool() -> ScriptedPool:
    return ScriptedPool(layers=3, experts=8, hosts=2)


@pytest.fixture
async def http(pool: ScriptedPool) -> AsyncGenerator[httpx.AsyncClient, None]:
    app, broadcast = page_app(pool)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=OWN) as client:
        yield client
    assert (broadcast.watching, broadcast.asks) == (0, False)


async def ask(http: httpx.AsyncClient, action: str, fields: Any, **headers: str) -> Answer:
    return await http.post(f"/actions/{action}", json=fields, headers={**BEARER, **headers})


def words(answer: Answer) -> str:
    return answer.json()["error"]["message"]


# ---- the files ----------------------------------------------------------------------------------


class Links(HTMLParser):
    """Whatever a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        for name, value in attrs:
            if name in ("src", "href"):
                self.found.append(value or "")
            if name.startswith("on") or name == "style":
                self.inline.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style") and data.strip():
            self.inline.append(data)


async def test_everything_comes_from_this_server(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    links = Links()
    links.feed(page.text)
    assert links.inline == []
    assert len(links.found) >= 4
    for link in links.found:
        assert (await http.get(link)).status_code == 200
    # Nor does a file name another server.
    for file in FILES.iterdir():
        addresses = re.findall(r"\bhttps?://[^\s\"')]+", file.read_text())
        assert [one for one in addresses if one != "http://www.w3.org/2000/svg"] == [], file.name


async def test_modules_import_modules_that_there_are(http: httpx.AsyncClient) -> None:
    for file in FILES.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', file.read_text()):
            assert (
                (await http.get(f"/page/{name}"))
                .headers["content-type"]
                .startswith("text/javascript")
            )


async def test_the_policy_of_each_file(http: httpx.AsyncClient) -> None:
    for path in ("/", "/page/main.js", "/page/page.css", "/page/mark.svg"):
        answer = await http.get(path)
        policy = dict(
            part.strip().split(" ", 1)
            for part in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


async def test_a_browser_asks_whether_a_file_has_changed(http: httpx.AsyncClient) -> None:
    first = await http.get("/page/main.js")
    again = await http.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["../page_app.py", "%2e%2e/page_app.py", "x.js", "index.html/"])
async def test_no_other_file_can_be_read(http: httpx.AsyncClient, name: str) -> None:
    answer = await http.get(f"/page/{name}")
    assert answer.status_code in (307, 404)


async def test_the_colours_are_those_of_matplotlib() -> None:
    text = (FILES / "colors.js").read_text()
    found = dict(re.findall(r'^  (\w+): "([0-9a-f]{102})"', text, re.MULTILINE))
    assert found.keys() == {"magma", "cividis", "berlin", "coolwarm"}
    for name, stops in found.items():
        colors = mpl.colormaps[name]
        assert stops == "".join(to_hex(colors(i / 16))[1:] for i in range(17))


# ---- who may act --------------------------------------------------------------------------------


async def test_who_has_the_key_may_act(http: httpx.AsyncClient, pool: ScriptedPool) -> None:
    assert (await ask(http, "check", {})).status_code == 204
    done = await ask(
        http, "drain", {"host": "host-1"}, Origin=OWN, **{"Sec-Fetch-Site": "same-origin"}
    )
    assert done.status_code == 200
    assert done.json()["reason"] == "drain host-1"
    assert pool.asked == [("drain", ("host-1", "page"))]


@pytest.mark.parametrize(
    "shown",
    [{}, {"Authorization": ""}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer "}],
)
async def test_nothing_happens_without_the_key(
    http: httpx.AsyncClient, pool: ScriptedPool, shown: dict[str, str]
) -> None:
    for action in ("check", "plan", "rebalance", "drain"):
        answer = await http.post(f"/actions/{action}", json={"host": "host-1"}, headers=shown)
        assert answer.status_code == 401
        assert "needs the operator key" in words(answer)
        assert "moesaic page" in words(answer)
    assert pool.asked == []


@pytest.mark.parametrize("key", [KEY[:-1], KEY + "x", KEY.upper(), "ключ"])
async def test_a_wrong_key_says_so(http: httpx.AsyncClient, pool: ScriptedPool, key: str) -> None:
    header = f"Bearer {key}".encode()
    answer = await http.post("/actions/plan", json={}, headers={b"Authorization": header})
    assert answer.status_code == 401
    assert "is not the operator key of this cluster" in words(answer)
    assert pool.asked == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
    ],
)
async def test_other_pages_may_not_act_even_with_the_key(
    http: httpx.AsyncClient, pool: ScriptedPool, headers: dict[str, str]
) -> None:
    answer = await ask(http, "drain", {"host": "host-1"}, **headers)
    assert answer.status_code == 403
    assert pool.asked == []


async def test_the_events_are_guarded_like_status(http: httpx.AsyncClient) -> None:
    for path in ("/", "/events", "/page/main.js"):
        answer = await http.get(path, headers={"Host": "evil.example"})
        assert answer.status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_form_cannot_act(http: httpx.AsyncClient, pool: ScriptedPool, kind: str) -> None:
    headers = {**BEARER, "Content-Type": kind}
    answer = await http.post("/actions/drain", content=b'{"host": "host-1"}', headers=headers)
    assert answer.status_code == 415
    assert pool.asked == []


# ---- what comes back ----------------------------------------------------------------------------


async def test_wrong_actions_and_bodies(http: httpx.AsyncClient, pool: ScriptedPool) -> None:
    unknown = await ask(http, "explode", {})
    assert unknown.status_code == 404
    assert "there is no action 'explode'; there are plan, rebalance" in words(unknown)
    wrong = await ask(http, "drain", {"hots": "host-1"})
    assert (wrong.status_code, words(wrong)) == (400, "host: Field required")
    large = await ask(http, "drain", {"host": "h" * 9000})
    assert large.status_code == 413
    assert (await http.get("/actions/drain")).status_code == 405
    assert pool.asked == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(ClusterError("host: 'x' does not exist"), 409), (NoAnswer("the controller restarts"), 503)],
)
async def test_an_error_of_the_controller_is_said_in_its_words(
    http: httpx.AsyncClient, pool: ScriptedPool, error: Exception, status: int
) -> None:
    pool.fails = error
    answer = await ask(http, "rebalance", {})
    assert (answer.status_code, words(answer)) == (status, str(error))


async def test_the_plan_is_a_report(http: httpx.AsyncClient) -> None:
    plan = (await ask(http, "plan", {})).json()
    assert len(plan["moves"]) == 1
    assert plan["balancedness_before"]["mean"] <= 1


# ---- events -------------------------------------------------------------------------------------


async def first_event(http: httpx.AsyncClient, broadcast: Broadcast) -> str:
    events = broadcast.events()
    broadcast.enter()
    try:
        return (await anext(events)).decode()
    finally:
        await events.aclose()
        broadcast.leave()


async def test_the_first_event_has_everything(pool: ScriptedPool) -> None:
    app, broadcast = page_app(pool)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=OWN) as http:
        event = await first_event(http, broadcast)
    kind, data = event.split("\n")[:2]
    assert kind == "event: snapshot"
    items = json.loads(data.removeprefix("data: "))["items"]
    assert {f"load:{n}:kimi-k2" for n in range(3)} <= items.keys()
    assert items["link"] == {"error": None}


def test_no_body_is_larger_than_what_is_read() -> None:
    assert page_app_module._BODIES.each_bytes == 8192
