"""`/livez`, `/readyz` and `/startupz`, for Kubernetes and load balancers.

The status is the answer; the body tells strangers nothing.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import Scope

from ....proto.errors import UnknownModel
from .health import Health

PATHS = frozenset({"/livez", "/readyz", "/startupz"})


def is_probe(scope: Scope) -> bool:
    root = scope.get("root_path", "").rstrip("/")
    # Relative to the prefix at which the app is mounted.
    path = scope["path"].removeprefix(root) if root else scope["path"]
    return scope["method"] in ("GET", "HEAD") and path in PATHS


def add_health(app: FastAPI, health: Health) -> None:
    """Answer probes on ``app``; they are not part of the API and its OpenAPI document."""

    async def livez() -> PlainTextResponse:
        return _answer(await health.live())

    async def startupz() -> PlainTextResponse:
        return _answer(await health.started())

    async def readyz(model: str | None = None) -> PlainTextResponse:
        try:
            return _answer(await health.ready(model))
        except UnknownModel:
            return PlainTextResponse("unknown model\n", status_code=404)

    for probe in (livez, startupz, readyz):
        path = f"/{probe.__name__}"
        app.add_api_route(path, probe, methods=["GET", "HEAD"], include_in_schema=False)


def _answer(yes: bool) -> PlainTextResponse:
    headers = {"Cache-Control": "no-store"}
    return PlainTextResponse("ok\n" if yes else "no\n", 200 if yes else 503, headers)
