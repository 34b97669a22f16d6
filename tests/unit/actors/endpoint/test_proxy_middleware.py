"""What Ray's proxy answers by itself, and what an application behind it answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http import auto

from moesaic.actors.endpoint.http import proxy_middleware
from moesaic.actors.endpoint.http.connections import BoundedConnection

RAYS = {
    "/no/app": (404, "Path '/no/app' not found. Ping http://.../-/routes for available routes."),
    "/busy": (503, "Request dropped due to backpressure: Deployment(name='Ingress', app='x')"),
    "/gone": (503, "The deployment Ingress of moesaic-secret is unavailable"),
    "/late": (408, "Request 3f2a timed out after 5s."),
    "/-/routes": (200, {"/": "moesaic-secret"}),
    "/-/healthz": (200, "success"),
}
OURS: dict[str, Response] = {
    "/answer": JSONResponse({"text": "x"}),
    "/error": JSONResponse({"error": {"message": "no"}}, 503),
    "/readyz": PlainTextResponse("no\n", 503),
    "/stream": StreamingResponse(iter(["data: x\n\n"]), media_type="text/event-stream"),
}


async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
    """As Ray's: pages of its own, and applications."""
    assert not [name for name, _ in scope["headers"] if name.startswith(b"x-request-")]
    if scope["path"] in OURS:
        await OURS[scope["path"]](scope, receive, send)
        return
    status, words = RAYS[scope["path"]]
    for message in convert_object_to_asgi_messages(words, status_code=status):
        await send(message)


async def ask(path: str) -> httpx.Response:
    headers: dict[str, Any] = {
        "x-request-timeout-seconds": "-1",
        "x-request-disconnect-disabled": "?1",
    }
    transport = httpx.ASGITransport(proxy_middleware.ProxyMiddleware(proxy))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        return await http.get(path, headers=headers)


@pytest.mark.parametrize("path", [path for path in RAYS if path != "/-/healthz"])
async def test_rays_words_are_not_told(path: str) -> None:
    answer = await ask(path)
    assert answer.status_code == (404 if path == "/-/routes" else RAYS[path][0])
    assert set(answer.json()) == {"error"}
    for word in ("moesaic-secret", "Ingress", "Deployment", "Ping", "3f2a"):
        assert word not in answer.text
    assert ("retry-after" in answer.headers) == (answer.status_code == 503)


@pytest.mark.parametrize("path", [*OURS, "/-/healthz"])
async def test_all_else_passes(path: str) -> None:
    answer = await ask(path)
    wanted = OURS.get(path)
    assert answer.status_code == (wanted.status_code if wanted else 200)
    words = {"/stream": b"data: x\n\n", "/-/healthz": b"success"}.get(path)
    assert answer.content == (words or getattr(wanted, "body", b""))


def test_the_hook_chooses_the_protocol_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    (one,) = proxy_middleware.middlewares()
    assert one.cls is proxy_middleware.ProxyMiddleware
    assert auto.AutoHTTPProtocol is BoundedConnection


def test_ray_reads_the_variable_that_is_set() -> None:
    from ray.serve._private import constants

    assert hasattr(constants, proxy_middleware.HOOK)
