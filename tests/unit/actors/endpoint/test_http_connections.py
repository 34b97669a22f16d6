"""Connections that strangers hold, on real sockets: with an honest client side by side."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from moesaic.actors.endpoint.http.connections import BoundedConnection, ConnectionLimits
from moesaic.actors.endpoint.http.monitoring_server import _Server

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
LARGE = b"x" * (32 << 20)  # more than sockets buffer


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"]
    if path == "/read":
        while (await receive()).get("more_body"):
            pass
    if path == "/wait":
        await asyncio.sleep(0.5)
    length = len(LARGE) if path == "/large" else 2
    headers = [(b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    body = LARGE if path == "/large" else b"ok"
    await send({"type": "http.response.body", "body": body[:1], "more_body": True})
    await send({"type": "http.response.body", "body": body[1:], "more_body": False})


@asynccontextmanager
async def serving(**limits: Any) -> AsyncGenerator[int, None]:
    class Connection(BoundedConnection):
        pass

    Connection.limits = ConnectionLimits(**{"head_s": 0.2, "stall_s": 0.3, **limits})
    Connection._idle = {}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=Connection, lifespan="off", ws="none", log_config=None)
        server = _Server(config)
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task
        assert not Connection._idle


async def connect(
    port: int, sent: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    return reader, writer


async def is_ended(reader: asyncio.StreamReader, within_s: float = 5.0) -> bool:
    """Whether the server ends the connection, whatever it says before."""
    try:
        async with asyncio.timeout(within_s):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


async def honest(port: int, path: str = "/") -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        for _ in range(3):
            assert (await http.get(path)).text == "ok"


@pytest.mark.parametrize("sent", [b"", b"GET", HEAD, HEAD + b"X: 1\r\n"])
async def test_a_head_that_does_not_come(sent: bytes) -> None:
    async with serving() as port:
        strangers = [await connect(port, sent) for _ in range(50)]
        await honest(port)
        assert all(await asyncio.gather(*(is_ended(reader) for reader, _ in strangers)))
        await honest(port)
        for _, writer in strangers:
            writer.close()


async def test_a_head_that_comes_byte_by_byte() -> None:
    async with serving() as port:
        reader, writer = await connect(port)
        ended = asyncio.create_task(is_ended(reader))
        for byte in HEAD + b"X: " + b"x" * 100:
            if ended.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert ended.done() and ended.result()
        writer.close()


@pytest.mark.parametrize("start", [b"", HEAD, b"GET /"])
async def test_a_head_without_end(start: bytes) -> None:
    async with serving(head_s=60.0) as port:
        reader, writer = await connect(port, start)
        ended = asyncio.create_task(is_ended(reader))
        sent = 0
        while not ended.done() and sent < 2 << 20:
            writer.write(b"X-More: " + b"x" * 1000 + b"\r\n" if b"\r" in start else b"x" * 1000)
            sent += 1000
            await asyncio.sleep(0)
        assert await ended
        await honest(port)
        writer.close()


async def test_the_rest_of_a_body_that_was_refused() -> None:
    async with serving() as port:
        sent = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nx"
        reader, writer = await connect(port, sent)
        ended = asyncio.create_task(is_ended(reader))
        for _ in range(100):
            if ended.done():
                break
            await asyncio.sleep(0.02)
            writer.write(b"x")
        assert ended.done() and ended.result()
        writer.close()


async def test_a_client_that_takes_nothing() -> None:
    async with serving() as port:
        large = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"
        reader, writer = await connect(port, large)
        writer.transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
        await honest(port)
        await asyncio.sleep(1.0)
        writer.transport.resume_reading()  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(len(LARGE))
        writer.close()
        # One who reads gets all of it.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert len((await http.get("/large")).content) == len(LARGE)


async def test_the_oldest_of_many_that_ask_for_nothing_go() -> None:
    async with serving(head_s=60.0, idle=20) as port:
        strangers = [await connect(port) for _ in range(20)]
        busy = asyncio.create_task(honest(port, "/wait"))
        await asyncio.sleep(0.1)
        more = [await connect(port) for _ in range(30)]
        await busy  # a request that runs gives its place to nobody
        assert await is_ended(strangers[0][0])
        assert not await is_ended(more[-1][0], 0.2)
        await honest(port)
        for _, writer in strangers + more:
            writer.close()


async def test_connections_that_are_used_again_are_kept() -> None:
    async with serving() as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        used = set()
        for _ in range(3):
            answer = await http.get("/")
            used.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            await asyncio.sleep(0.4)  # longer than a head may take
        assert len(used) == 1
        slow = await http.post("/read", content=trickling())
        assert slow.text == "ok", "the body has a deadline of its own"


async def trickling() -> AsyncGenerator[bytes, None]:
    for _ in range(5):
        await asyncio.sleep(0.1)
        yield b"x"
