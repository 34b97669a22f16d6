"""A Serve that runs already, and what a spec asks of it: it fits, or the reason why not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ray.serve.config import HTTPOptions, ProxyLocation

from moesaic.actors.serve import serve_border
from moesaic.actors.serve.serve_border import (
    ServeAddress,
    ServeState,
    find_address,
    wait_answers,
    wait_monitored,
)
from moesaic.cluster.reports.status import EndpointStatus
from moesaic.cluster.spec.spec import Spec, parse_spec
from moesaic.proto.errors import ClusterError
from tests.helpers.cluster.reports import engine_report

THEIRS = HTTPOptions(host="127.0.0.1", port=8111)


def spec(**endpoint: Any) -> Spec:
    return parse_spec({"name": "two", "models": [{"name": "m", "path": "p"}], "endpoint": endpoint})


@pytest.fixture
def serve_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(
        http: HTTPOptions,
        routes: dict[str, str | None],
        location: ProxyLocation = ProxyLocation.HeadOnly,
        on_head: bool = True,
    ) -> None:
        running = ServeState(http, location, routes)
        head = {"NodeID": "head", "NodeManagerAddress": "10.0.0.1"}
        monkeypatch.setattr(serve_border, "_end_orphans", lambda: None)
        monkeypatch.setattr(serve_border, "find_serve", lambda: running)
        monkeypatch.setattr(serve_border, "_head", lambda: head)
        monkeypatch.setattr(serve_border, "_this_node", lambda: "head" if on_head else "other")

    return run


def test_the_place_beside_others(serve_with: Any) -> None:
    serve_with(THEIRS, {"moesaic-one": "/"})
    for port in (0, 8111):
        place = find_address(spec(port=port))
        assert place.serve_runs
        assert place.url == "http://127.0.0.1:8111/two"
    serve_with(THEIRS, {"moesaic-one": "/one", "theirs": None})
    assert find_address(spec(port=8111)).url == "http://127.0.0.1:8111"


REFUSED: list[tuple[HTTPOptions, dict[str, Any], str]] = [
    (THEIRS, {"port": 8121}, "endpoint.port: 8121, but Serve on this Ray runs already"),
    (THEIRS, {"port": 8121}, "set `endpoint: {host: 127.0.0.1, port: 8111}`, where .* at /two"),
    (THEIRS, {"host": "0.0.0.0", "port": 0}, "endpoint.host: 0.0.0.0, but"),
    (HTTPOptions(host=None), {"port": 0}, "endpoint: .* serves no HTTP"),
    (
        HTTPOptions(host="127.0.0.1", port=8111, request_timeout_s=20.0),
        {"port": 0},
        "endpoint.limits.request_s: None, but .* after 20 s",
    ),
    (
        HTTPOptions(host="127.0.0.1", port=8111, ssl_keyfile="k", ssl_certfile="c"),
        {"port": 0},
        "TLS",
    ),
]


@pytest.mark.parametrize(("http", "endpoint", "words"), REFUSED)
def test_what_does_not_fit(
    serve_with: Any, http: HTTPOptions, endpoint: dict[str, Any], words: str
) -> None:
    serve_with(http, {"moesaic-one": "/"})
    with pytest.raises(ClusterError, match=words):
        find_address(spec(**endpoint))


def test_a_serve_without_proxies(serve_with: Any) -> None:
    serve_with(THEIRS, {}, ProxyLocation.Disabled)
    with pytest.raises(ClusterError, match="serves no HTTP"):
        find_address(spec(port=8111))


def test_a_shorter_time_than_serve_gives(serve_with: Any) -> None:
    serve_with(HTTPOptions(host="127.0.0.1", port=8111, request_timeout_s=20.0), {})
    assert find_address(spec(port=8111, limits={"request_s": 20.0})).port == 8111


def test_a_path_that_is_taken(serve_with: Any) -> None:
    serve_with(THEIRS, {"a": "/", "theirs": "/two"})
    with pytest.raises(
        ClusterError, match=r"^name: Serve on this Ray already has the application 'theirs' at /two"
    ):
        find_address(spec(port=8111))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_of_another_machine(serve_with: Any, host: str) -> None:
    serve_with(HTTPOptions(host=host, port=8111), {}, on_head=False)
    with pytest.raises(ClusterError, match=r"head node \(10.0.0.1\), which is not this"):
        find_address(spec(host=host, port=8111))


def test_every_address_is_printed_as_one_that_others_reach(serve_with: Any) -> None:
    serve_with(HTTPOptions(host="0.0.0.0", port=8111), {}, on_head=False)
    assert find_address(spec(host="0.0.0.0", port=8111)).url == "http://10.0.0.1:8111"
    assert ServeAddress("::1", 80).url == "http://[::1]:80"


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([httpx.Response(404), httpx.Response(200, json={"data": [{"id": "x"}]})])

    def get(self: httpx.Client, url: str) -> httpx.Response:
        answer = next(answers, httpx.Response(200, json={"data": [{"id": "m"}]}))
        answer.request = httpx.Request("GET", url)
        return answer

    monkeypatch.setattr(serve_border, "_LOOK_S", 0.0)
    monkeypatch.setattr(httpx.Client, "get", get)
    wait_answers("http://127.0.0.1:80", ["m"], 10.0)
    with pytest.raises(ClusterError, match=r"does not answer for n within 0 s: it serves \['m'\]"):
        wait_answers("http://127.0.0.1:80", ["n"], 0.0)


def test_a_monitoring_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    status = EndpointStatus(healthy=True, engines={"m": engine_report()}, cluster=None)
    answers = iter([httpx.Response(404), httpx.Response(200, json={"data": []})])

    def get(self: httpx.Client, url: str) -> httpx.Response:
        answer = next(answers, httpx.Response(200, content=status.model_dump_json()))
        answer.request = httpx.Request("GET", url)
        return answer

    monkeypatch.setattr(serve_border, "_LOOK_S", 0.0)
    monkeypatch.setattr(httpx.Client, "get", get)
    wait_monitored("http://127.0.0.1:80", ["m"], 10.0)
    with pytest.raises(ClusterError, match=r"within 0 s: it has the models \['m'\]; if another"):
        wait_monitored("http://127.0.0.1:80", ["n"], 0.0)
    answers = iter([httpx.Response(200, json=[])])
    with pytest.raises(ClusterError, match="its answer is not the status of a cluster"):
        wait_monitored("http://127.0.0.1:80", ["m"], 0.0)
