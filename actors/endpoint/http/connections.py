"""Bound what a client's connection can hold on to in uvicorn, which has no such limits.

uvicorn has no deadline for the head of a request or for a client that does not read its answer. Nor
does it bound the bytes of a head or the number of idle connections.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits of one connection, and of the idle ones together.

    ``head_s``: from the first byte of a request, or from the connection itself, to the end of
    the request's head. ``stall_s``: for a client to take the 48 KiB or so of an answer that are
    in flight. ``idle``: connections that have no request.
    """

    head_s: float = 10.0
    head_bytes: int = 64 << 10
    stall_s: float = 60.0
    idle: int = 1024


class BoundedConnection(HttpToolsProtocol):
    """The protocol class for `uvicorn.Config(http=...)`."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    # All idle connections of this process; the one that has been idle longest comes first.
    _idle: ClassVar[dict[BoundedConnection, None]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_due: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        self._is_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._has_request():
            super().data_received(data)
            return
        if self._head_due is None:
            self._wait_for_head()
        # The rest of a body whose request was answered early counts as well.
        self._head_bytes += len(data)
        super().data_received(data)
        if self._has_request():
            self._forget_head()
            self._idle.pop(self, None)
        elif self._head_bytes > self.limits.head_bytes and self._is_reading_head:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._is_reading_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_reading_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end()
        elif not self._has_request():  # otherwise the client has sent its next request already
            self._is_idle()

    def handle_websocket_upgrade(self) -> None:
        self._forget()
        super().handle_websocket_upgrade()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._end()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    _is_reading_head = False

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        self._head_bytes = 0
        self._head_due = self.loop.call_later(self.limits.head_s, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _is_idle(self) -> None:
        self._idle.pop(self, None)
        self._idle[self] = None
        if len(self._idle) > self.limits.idle:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.transport.abort()

    def _end(self) -> None:
        """Abort the connection later, even if the client has not taken the rest of its answer."""
        self.loop.call_later(self.limits.stall_s, self.transport.abort)

    def _forget(self) -> None:
        self._forget_head()
        self._idle.pop(self, None)
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
