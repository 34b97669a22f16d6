"""The page at the monitoring address: its files, its events, and what operators do with it.

Reading is open to whoever reaches the address, like `/status`. An action needs the operator key in
a header, which no other site's page can send. The page gets it in the fragment of its address,
which browsers send to no server.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ...cluster.page_feed.actions import ACTIONS, BODY_BYTES, parsed_action
from ...cluster.page_feed.items import FeedRevision, ItemChanges
from ...cluster.service.web_guard import check_same_site
from ...proto.errors import ClusterError, Unauthenticated
from ...proto.keys import same_key
from ..endpoint.http.bodies import Bodies, BodyLimits
from .broadcast import Broadcast

log = logging.getLogger(__name__)

# Everything comes from this server, and no other page may show this one in a frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A browser asks each time whether a file has changed, so it never mixes two versions.
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_BODIES = BodyLimits(each_bytes=BODY_BYTES, all_bytes=64 * BODY_BYTES, arrive_s=5.0, most=64)
FILES = Path(__file__).parent / "static"


class PageSource(Protocol):
    """What the page is about: a cluster's controller."""

    async def items(self, known: FeedRevision | None) -> ItemChanges:
        """Return what has changed since ``known``. Raises MoesaicError."""
        ...

    async def act(self, method: str, arguments: tuple[Any, ...]) -> BaseModel:
        """Call a method of the controller for an operator. Raises MoesaicError."""
        ...

    async def operator_key(self) -> str:
        """Return the key that operators show. Raises MoesaicError."""
        ...


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    kind: str
    tag: str


def add_page(app: FastAPI, source: PageSource, own: Callable[[], Awaitable[Any]]) -> Broadcast:
    """Add the page to the monitoring app, whose middleware words its errors.

    ``own()`` returns the items that this process knows itself. Close the broadcast that is returned
    before the server ends.
    """
    files = _files()
    broadcast = Broadcast(source.items, own)
    bodies = Bodies(_BODIES)

    @app.get("/")
    async def index(request: Request) -> Response:
        return _sent(files["index.html"], request)

    @app.get("/page/{name}")
    async def file(name: str, request: Request) -> Response:
        found = files.get(name)
        if found is None:
            raise HTTPException(404, f"there is no file {name[:100]!r}")
        return _sent(found, request)

    @app.get("/events")
    async def events() -> Response:
        broadcast.enter()
        return _Events(broadcast)

    @app.post("/actions/{name}")
    async def act(name: str, request: Request) -> Response:
        headers = request.headers
        check_same_site(
            headers.getlist("host"), headers.getlist("origin"), headers.getlist("sec-fetch-site")
        )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"Content-Type: {kind[:100]!r} is not application/json")
        await _check_key(headers.getlist("authorization"), source)
        if name == "check":
            return Response(status_code=204)
        if name not in ACTIONS:
            there_are = ", ".join(ACTIONS)
            raise HTTPException(404, f"there is no action {name[:100]!r}; there are {there_are}")
        action = await bodies.parsed(request, lambda body: parsed_action(name, body))
        method, arguments = action.call()
        if name != "plan":
            log.info("an operator asks on the page: %s %s", name, action.model_dump())
        try:
            done = await source.act(method, arguments)
        except ClusterError as error:
            # The controller refuses it as things are, or cannot do it: nothing of ours failed.
            raise HTTPException(409, str(error)) from error
        return Response(done.model_dump_json(), media_type="application/json")

    return broadcast


async def _check_key(shown: list[str], source: PageSource) -> None:
    how = "`moesaic page` prints the page's address with the key"
    scheme, _, key = shown[0].partition(" ") if len(shown) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated(
            f"Authorization: an action needs the operator key of this cluster; {how}"
        )
    if not same_key(key.strip(), await source.operator_key()):
        raise Unauthenticated(
            f"Authorization: this is not the operator key of this cluster, which may have been "
            f"started anew; {how}"
        )


def _files() -> dict[str, _File]:
    """Read all files of the page, so that a request can reach no other."""
    found = {}
    for path in sorted(FILES.iterdir()):
        if path.suffix in _TYPES:
            data = path.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            found[path.name] = _File(data, _TYPES[path.suffix], tag)
    return found


def _sent(file: _File, request: Request) -> Response:
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.kind, headers=headers)


class _Events(StreamingResponse):
    """A stream of events to one browser, which has entered the broadcast."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._events: AsyncGenerator[bytes, None] = broadcast.events()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        headers["X-Content-Type-Options"] = "nosniff"
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._broadcast.leave()
