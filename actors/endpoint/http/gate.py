"""Count running requests, limit them, and end them when the service ends.

This is ASGI middleware, so that every request counts, whether it is reading its body, waiting for a
token, or sending. A request that is not over at the deadline still gets an answer: an error status
if it has none yet, a last event if it is a stream.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ....proto.errors import Busy, Ending
from .edge import error_answer, told
from .probes import is_probe

log = logging.getLogger(__name__)

# More than all trunks take together.
MOST = 4096


class Gate:
    """The requests of one app; use it in the app's own event loop only."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._running: set[asyncio.Timeout] = set()
        self._drain_s: float | None = None

    @property
    def running(self) -> int:
        """Requests that are not over; probes do not count."""
        return len(self._running)

    @property
    def ending(self) -> bool:
        """Whether new requests are refused for good."""
        return self._drain_s is not None

    def drain(self, drain_s: float) -> int:
        """Refuse new requests from now on, and give running ones ``drain_s`` seconds.

        Returns how many run. Only the first call sets the deadline.
        """
        if self._drain_s is None:
            self._drain_s = drain_s
            until = asyncio.get_running_loop().time() + drain_s
            for request in self._running:
                request.reschedule(until)
            log.info(
                "the endpoint refuses new requests; the %d running requests have %g s to finish",
                self.running,
                drain_s,
            )
        return self.running

    def check(self) -> None:
        """Raise Ending or Busy where a new request is refused."""
        if self.ending:
            raise Ending()
        if len(self._running) >= self._most:
            raise Busy(f"{self._most} requests are running or waiting; try again later")

    def enter(self, request: asyncio.Timeout) -> None:
        self._running.add(request)

    def leave(self, request: asyncio.Timeout) -> None:
        self._running.discard(request)
        if self.ending and not self._running:
            log.info("the endpoint has ended its last request")

    def too_late(self) -> Ending:
        return Ending(
            f"the service is ending, and the request did not finish within the "
            f"{self._drain_s or 0:g} s that it had left (endpoint.drain_s); send it again later, "
            "or to another endpoint"
        )


class GateMiddleware:
    """ASGI middleware for a `Gate`; probes pass, since they ask about the gate itself."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._gate.check()
        except (Ending, Busy) as error:
            await error_answer(error, _identity(scope))(scope, receive, send)
            return
        answer, request = _Answer(send), asyncio.timeout(None)
        try:
            async with request:
                self._gate.enter(request)
                try:
                    await self._app(scope, receive, answer.send)
                finally:
                    self._gate.leave(request)
        except TimeoutError:
            if not request.expired():
                raise
            error = self._gate.too_late()
            if not answer.begun:
                await error_answer(error, _identity(scope))(scope, receive, send)
            else:
                await answer.end_with(error, _identity(scope))


class _Answer:
    """How much of an answer has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self._over = False
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
        await self._send(message)

    async def end_with(self, error: Ending, identity: str) -> None:
        """End the body; a stream of events first gets the error as one more event.

        Each message that was sent holds whole events, so the new one does not split
        another.
        """
        if self._over:
            return
        event = f"data: {told(error, identity).model_dump_json()}\n\n" if self._streams else ""
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _identity(scope: Scope) -> str:
    return scope.get("state", {}).get("request_id", "")
