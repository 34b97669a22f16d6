"""Pages in browsers: which may use the endpoint, and what they may read of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from moesaic.actors.endpoint.http.bodies import BodyLimits
from moesaic.actors.endpoint.ingress import create_app
from moesaic.cluster.service.web_guard import WebGuard
from moesaic.cluster.spec.spec import parse_spec
from tests.helpers.endpoint.service import scripted_models

PAGE, OTHER = "https://chat.example", "https://elsewhere.example"
CHAT: dict[str, Any] = {"model": "script", "messages": [{"role": "user", "content": "hi"}]}
# What the official client sends from within a browser.
ASKED_HEADERS = (
    "authorization,content-type,x-request-id,x-stainless-arch,x-stainless-lang,x-stainless-os,"
    "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-timeout"
)


def ask(
    method: str,
    path: str,
    *,
    origins: Sequence[str],
    origin: str | None = PAGE,
    listens: str = "0.0.0.0",
    **more: Any,
) -> httpx.Response:
    async def asked() -> httpx.Response:
        app = create_app(
            models=scripted_models(),
            bodies=BodyLimits(each_bytes=1000, all_bytes=10_000, arrive_s=5.0),
            cors_origins=origins,
            guard=WebGuard.of(listens, origins=origins),
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        headers = {**({} if origin is None else {"origin": origin}), **more.pop("headers", {})}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, headers=headers, **more)

    return asyncio.run(asked())


def preflight(path: str, *, origins: Sequence[str], origin: str = PAGE) -> httpx.Response:
    wanted = {
        "access-control-request-method": "POST",
        "access-control-request-headers": ASKED_HEADERS,
    }
    return ask("OPTIONS", path, origins=origins, origin=origin, headers=wanted)


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/x"]
)
def test_a_browser_may_send_what_clients_send(path: str) -> None:
    answer = preflight(path, origins=[OTHER, PAGE])
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == ASKED_HEADERS
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("GET", "/v1/models", {}, 200),
        ("GET", "/v1/models/script", {}, 200),
        ("POST", "/v1/chat/completions", {"json": CHAT}, 200),
        ("POST", "/v1/chat/completions", {"json": {**CHAT, "stream": True}}, 200),
        ("POST", "/v1/chat/completions", {"json": {**CHAT, "n": 0}}, 400),
        ("POST", "/v1/chat/completions", {"json": {**CHAT, "model": "nope"}}, 404),
        ("GET", "/v1/nothing", {}, 404),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/v1/chat/completions", {"content": b"x" * 2000}, 413),
        (
            "POST",
            "/v1/chat/completions",
            {"json": {**CHAT, "messages": [{"role": "user", "content": "busy"}]}},
            429,
        ),
        (
            "POST",
            "/v1/chat/completions",
            {"json": {**CHAT, "messages": [{"role": "user", "content": "broken"}]}},
            500,
        ),
    ],
)
def test_a_page_may_read_every_answer(
    method: str, path: str, more: dict[str, Any], status: int
) -> None:
    answer = ask(method, path, origins=[PAGE], **more)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert (
        answer.headers["access-control-expose-headers"] == "x-request-id, x-trace-id, retry-after"
    )
    assert "Origin" in answer.headers["vary"]
    assert answer.headers["x-request-id"]
    if more.get("json", {}).get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    # Another page gets the answer, too, and its browser keeps it from it.
    foreign = ask(method, path, origins=[PAGE], origin=OTHER, **more)
    assert "access-control-allow-origin" not in foreign.headers


def test_pages_of_other_origins_may_not() -> None:
    for other in (OTHER, "null", "http://chat.example", f"{PAGE}:8443", f"{PAGE}.evil.example"):
        answer = preflight("/v1/chat/completions", origins=[PAGE], origin=other)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


def test_without_the_key_nothing_is_said_of_origins() -> None:
    answers = [
        preflight("/v1/chat/completions", origins=()),
        ask("POST", "/v1/chat/completions", origins=(), json=CHAT),
    ]
    assert [answer.status_code for answer in answers] == [405, 200]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_on_loopback_pages_of_other_origins_do_not_even_ask() -> None:
    """A browser keeps an answer from them; what they ask for would be done all the same."""
    here: dict[str, Any] = {"origins": [PAGE], "listens": "127.0.0.1"}
    for other in (OTHER, "null", f"{PAGE}:8443"):
        for asked in (
            ask("POST", "/v1/chat/completions", origin=other, json=CHAT, **here),
            ask("OPTIONS", "/v1/chat/completions", origin=other, **here),
            ask("GET", "/v1/models", origin=other, **here),
        ):
            assert (asked.status_code, asked.json()["error"]["code"]) == (403, "Forbidden")
            assert asked.headers["x-request-id"]
            assert "access-control-allow-origin" not in asked.headers
    honest = ask("POST", "/v1/chat/completions", json=CHAT, **here)
    assert (honest.status_code, honest.headers["access-control-allow-origin"]) == (200, PAGE)
    assert ask("GET", "/v1/models", origin="null", origins=["*"], listens="::1").status_code == 200


def test_a_star_is_every_origin() -> None:
    assert preflight("/v1/models", origins=["*"]).headers["access-control-allow-origin"] == "*"
    answer = ask("GET", "/v1/models", origins=["*"], origin="null")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_client_that_is_no_browser_sees_no_difference() -> None:
    answer = ask("GET", "/v1/models", origins=[PAGE], origin=None)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_origins_in_the_spec() -> None:
    origins = (PAGE, "http://localhost:3000", "http://[::1]:3000", "app://obsidian.md")
    endpoint = parse_spec({"endpoint": {"cors_origins": list(origins)}}).endpoint
    assert endpoint is not None
    assert endpoint.cors_origins == origins
