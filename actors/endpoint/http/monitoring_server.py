"""Serve an endpoint's monitoring address in the ingress's process and on its event loop.

So it sees the ingress's counts, ends with it, and answers even when the controller is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from ...runtime.ports import resolved
from .connections import BoundedConnection

logger = logging.getLogger(__name__)

# The port of a process that was just killed may stay taken for a moment.
TRY_AGAIN_S = 0.5
_BACKLOG = 64
_KEEP_ALIVE_S = 5
_END_S = 2.0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


@contextlib.asynccontextmanager
async def monitoring(
    app: ASGIApp, host: str, port: int, ending: Callable[[], None] = lambda: None
) -> AsyncGenerator[None, None]:
    """Serve ``app`` at the address; while the port is taken, keep trying.

    The endpoint serves requests meanwhile. ``ending`` is called before the server ends, so that
    streams of events end with an event.
    """
    serving = asyncio.create_task(_serve(app, host, port), name="monitoring")
    try:
        yield
    finally:
        ending()
        await asyncio.sleep(0)  # streams that wait for news send their last event
        serving.cancel()
        # `_serve` logs its own errors.
        await asyncio.gather(serving, return_exceptions=True)


async def _serve(app: ASGIApp, host: str, port: int) -> None:
    try:
        with await _listen(host, port) as listener:
            await _serve_on(app, listener)
    except Exception:
        # Whatever it is, the endpoint goes on without its monitoring.
        logger.exception(
            "monitoring.port: the server at %s:%d has ended; the endpoint goes on without it",
            host,
            port,
        )


async def _serve_on(app: ASGIApp, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http=BoundedConnection,
        access_log=False,
        log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        await asyncio.shield(task)
    finally:
        server.should_exit = True
        server.force_exit = True
        await asyncio.wait({task}, timeout=_END_S)


async def _listen(host: str, port: int) -> socket.socket:
    family, address = resolved("monitoring.host", host)
    told = False
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if not told:
                logger.warning(
                    "monitoring.port: cannot listen on %s:%d (%s); trying again",
                    host, port, error.strerror or error,
                )  # fmt: skip
            told = True
            await asyncio.sleep(TRY_AGAIN_S)
        else:
            return listener
