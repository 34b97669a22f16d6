"""Middleware in Ray Serve's HTTP proxy, before any request reaches an ingress.

It bounds connections, and replaces Ray's own error pages, which tell about the inside of Ray. Ray
calls `middlewares` in the proxy's process, since a cluster that starts Serve sets the hook
(`serve_border.start_serve`). A Serve that others started has none of this.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from ....proto.errors import Expired, InternalError, MoesaicError, NoAnswer, RequestError
from .connections import BoundedConnection
from .edge import error_answer

# The environment variable in which Ray looks for the hook.
HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Ray's page that lists all applications.
_ROUTES = "/-/routes"
# With these a client could set Ray's timeout, and turn off its detection of disconnects.
_NOT_FOR_CLIENTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


def middlewares() -> list[Middleware]:
    """Return the middleware, as Ray's hook.

    It also replaces uvicorn's protocol class here: Ray leaves that choice to `auto` and has no
    option.
    """
    auto.AutoHTTPProtocol = BoundedConnection
    return [Middleware(ProxyMiddleware)]


class ProxyMiddleware:
    """ASGI middleware around Ray's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].rstrip("/") == _ROUTES:
            refused = RequestError(f"{scope['method']} {_ROUTES}: Not Found")
            await error_answer(refused, status_code=404)(scope, receive, send)
            return
        scope["headers"] = [one for one in scope["headers"] if one[0] not in _NOT_FOR_CLIENTS]
        await self._app(scope, receive, _Answer(scope, receive, send).send)


class _Answer:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._replaced = False

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start" and _is_rays(message):
            self._replaced = True
            status = message["status"]
            answer = error_answer(_error(self._scope, status), status_code=status)
            await answer(self._scope, self._receive, self._send)
            return
        await self._send(message)


def _is_rays(message: Message) -> bool:
    """Return whether it is a page of Ray's proxy.

    Pages of frameworks have a content length; Ray's have none.
    """
    headers = dict(message.get("headers", ()))
    kind = bytes(headers.get(b"content-type", b""))
    return (
        message["status"] >= 400
        and kind.startswith(b"text/plain")
        and b"content-length" not in headers
    )


def _error(scope: Scope, status: int) -> MoesaicError:
    match status:
        case 404:
            return RequestError(f"{scope['method']} {scope['path'][:200]}: Not Found")
        case 408:
            return Expired(
                "the request took longer than endpoint.limits.request_s allows; ask for fewer "
                "tokens, or send it again later"
            )
        case 429 | 503:
            return NoAnswer()
        case _:
            return InternalError()
