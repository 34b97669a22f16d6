"""Bodies of requests: deadline and budget, with a stranger who holds back and a client who does
not, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.requests import Request

from moesaic.actors.endpoint.http.bodies import Bodies, BodyLimits
from moesaic.proto.errors import BodyTooLarge, MoesaicError, Overloaded, SlowBody

LIMITS = BodyLimits(each_bytes=100, all_bytes=300, arrive_s=60.0, most=10)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Sender:
    """A client, and what it has sent."""

    def __init__(self, bodies: Bodies, declared: int | None = None) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        length = [] if declared is None else [(b"content-length", str(declared).encode())]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": length}
        self.parsing: list[bytes] = []
        self.may_parse = asyncio.Event()
        self.task = asyncio.create_task(
            bodies.parsed(Request(scope, self._messages.get), self._parse)
        )
        self._loop = asyncio.get_running_loop()

    def _parse(self, data: bytes) -> int:
        self.parsing.append(data)
        asyncio.run_coroutine_threadsafe(self.may_parse.wait(), self._loop).result(10)
        return len(data)

    async def send(self, data: bytes, *, more: bool = True) -> None:
        message = {"type": "http.request", "body": data, "more_body": more}
        self._messages.put_nowait(message)
        await settle()

    async def whole(self, data: bytes) -> int:
        self.may_parse.set()
        await self.send(data, more=False)
        return await self.task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def holding(
    bodies: Bodies, count: int, sent: int, declared: int | None = None
) -> AsyncGenerator[list[Sender], None]:
    """Strangers who send the beginning of a body and no more."""
    senders = [Sender(bodies, declared) for _ in range(count)]
    try:
        for one in senders:
            await one.send(b"x" * sent)
        yield senders
    finally:
        for one in senders:
            one.task.cancel()
        await asyncio.gather(*(one.task for one in senders), return_exceptions=True)
        assert bodies.held_bytes == 0


def error_of(sender: Sender) -> MoesaicError:
    error = sender.task.exception()
    assert isinstance(error, MoesaicError)
    return error


async def test_a_body_that_does_not_come_ends_at_its_deadline() -> None:
    bodies = Bodies(BodyLimits(each_bytes=100, all_bytes=300, arrive_s=0.05))
    async with holding(bodies, 3, sent=10) as strangers:
        assert await Sender(bodies, 5).whole(b"hello") == 5
        for one in strangers:
            with pytest.raises(SlowBody, match=r"0\.05 s \(endpoint\.limits\.body_s\)"):
                await one.task
    assert SlowBody.http_status == 408


async def test_what_is_announced_and_not_sent_takes_no_room() -> None:
    bodies = Bodies(LIMITS, clock=Clock())
    async with holding(bodies, 9, sent=1, declared=100):
        assert bodies.held_bytes == 9
        assert await Sender(bodies, 100).whole(b"x" * 100) == 100


async def test_beyond_the_budget_a_body_is_refused_before_it_is_read() -> None:
    clock = Clock()
    bodies = Bodies(LIMITS, clock=clock)
    async with holding(bodies, 3, sent=90) as strangers:
        refused = Sender(bodies, 50)  # nothing of it is sent
        await settle()
        assert isinstance(error_of(refused), Overloaded)
        assert Overloaded.http_status == 503
        unannounced = Sender(bodies)
        await unannounced.send(b"x" * 31)
        assert isinstance(error_of(unannounced), Overloaded)
        assert await Sender(bodies, 30).whole(b"x" * 30) == 30, "there is room for a small one"
        # Those that hold back are no longer taken for honest, the oldest first.
        clock.now = 1.5
        assert await Sender(bodies, 100).whole(b"x" * 100) == 100
        assert isinstance(error_of(strangers[0]), Overloaded)
        assert not strangers[1].task.done() and not strangers[2].task.done()


async def test_a_body_counts_until_it_has_been_parsed() -> None:
    clock = Clock()
    bodies = Bodies(LIMITS, clock=clock)
    parsed = [Sender(bodies) for _ in range(3)]
    for one in parsed:
        await one.send(b"x" * 100, more=False)
    assert bodies.held_bytes == 300
    clock.now = 100.0  # and is not pushed out
    refused = Sender(bodies, 1)
    await settle()
    assert isinstance(error_of(refused), Overloaded)
    for one in parsed:
        one.may_parse.set()
        assert await one.task == 100
    assert bodies.held_bytes == 0
    assert await Sender(bodies).whole(b"x") == 1


async def test_so_many_may_arrive_at_a_time() -> None:
    clock = Clock()
    bodies = Bodies(LIMITS, clock=clock)
    async with holding(bodies, 10, sent=0) as strangers:
        refused = Sender(bodies)
        await settle()
        assert isinstance(error_of(refused), Overloaded)
        clock.now = 1.5
        assert await Sender(bodies).whole(b"honest") == 6
        assert [one.task.done() for one in strangers] == [True, *[False] * 9]


@pytest.mark.parametrize("declared", ["101", "-1", "x", "1e3", "١"])
async def test_too_large_before_it_is_read(declared: str) -> None:
    bodies = Bodies(LIMITS)
    headers = [(b"content-length", declared.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    with pytest.raises(BodyTooLarge):
        await bodies.parsed(Request(scope, receive), len)


async def test_too_large_while_it_comes() -> None:
    bodies = Bodies(LIMITS)
    sender = Sender(bodies, 100)
    await sender.send(b"x" * 60)
    await sender.send(b"x" * 60)
    assert isinstance(error_of(sender), BodyTooLarge)
    assert bodies.held_bytes == 0


async def test_errors_of_parsing_and_cancelling_give_room_back() -> None:
    bodies = Bodies(LIMITS)

    def fail(data: bytes) -> None:
        raise ValueError(data)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 50, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(ValueError, match="xxx"):
        await bodies.parsed(Request(scope, receive), fail)
    async with holding(bodies, 2, sent=50):
        pass
    assert bodies.held_bytes == 0
