"""The page of a scripted pool, served by a thread while a test drives the browser."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

from moesaic.actors.page.broadcast import Broadcast
from tests.helpers.endpoint.page_server import served_page
from tests.helpers.endpoint.scripted_pool import ScriptedPool

START_S = 30.0


@contextlib.contextmanager
def page_thread(pool: ScriptedPool, *, drift_s: float = 0.0) -> Iterator[tuple[str, Broadcast]]:
    """Yield the address; with ``drift_s`` the load drifts so often."""
    told: list[tuple[str, Broadcast]] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        async with served_page(pool) as found:
            told.append(found)
            ready.set()
            drifting = asyncio.create_task(_drift(pool, drift_s))
            await done.wait()
            drifting.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(START_S)
        yield told[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(START_S)
        assert not thread.is_alive()
        loop.close()


async def _drift(pool: ScriptedPool, drift_s: float) -> None:
    began = time.monotonic()
    while drift_s:
        await asyncio.sleep(drift_s)
        now = time.monotonic()
        pool.advance(now - began)
        began = now
