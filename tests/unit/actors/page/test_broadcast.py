"""One task asks for all browsers, and only while there are any; a slow one holds nothing up."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from moesaic.actors.page import broadcast as broadcast_module
from moesaic.actors.page.broadcast import Broadcast
from moesaic.cluster.page_feed.encoding import decoded
from moesaic.cluster.page_feed.items import FeedRevision, ItemChanges, ItemStore, same_value
from moesaic.proto.errors import NoAnswer, Overloaded
from tests.helpers.endpoint.page_server import served_page
from tests.helpers.endpoint.scripted_pool import ScriptedPool


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast_module, "QUIET_S", 0.001)
    monkeypatch.setattr(broadcast_module, "FAILED_S", 0.001)
    monkeypatch.setattr(broadcast_module, "OWN_S", 0.001)


class Counter:
    """A source of items with one number; it says how often it was asked, and since when."""

    def __init__(self) -> None:
        self.store = ItemStore(term=4)
        self.asked: list[FeedRevision | None] = []
        self.fails: Exception | None = None
        self.set(0)

    def set(self, number: int, **more: Any) -> None:
        self.store.put("number", number)
        self.store.put_group("more:", more)
        self.store.commit()

    async def items(self, known: FeedRevision | None) -> ItemChanges:
        self.asked.append(known)
        if self.fails is not None:
            raise self.fails
        return self.store.since(known)


async def nothing() -> Mapping[str, Any]:
    return {}


def broadcast_of(source: Counter, own: Any = nothing) -> Broadcast:
    return Broadcast(source.items, own, update_s=0.001)


@asynccontextmanager
async def browser(broadcast: Broadcast) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
    broadcast.enter()
    try:
        async with aclosing(broadcast.events()) as events, asyncio.timeout(10):
            yield events
    finally:
        broadcast.leave()


class Page:
    """What a browser has."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}
        self.kinds: list[str] = []
        self.revision: Any = None

    def take(self, event: bytes) -> None:
        kind, data = event.decode().split("\n")[:2]
        self.kinds.append(kind.removeprefix("event: "))
        told = json.loads(data.removeprefix("data: "))
        if self.kinds[-1] == "snapshot":
            self.items = {}
        elif self.kinds[-1] == "delta":
            assert told["from"] == self.revision
            for name in told["removed"]:
                self.items.pop(name, None)
        else:
            return
        self.items |= {name: decoded(value) for name, value in told["items"].items()}
        self.revision = told["to"]

    async def until(self, events: AsyncGenerator[bytes, None], number: int) -> None:
        while self.items.get("number") != number:
            self.take(await anext(events))


async def test_a_browser_gets_everything_and_then_what_changes() -> None:
    source, page = Counter(), Page()
    async with browser(broadcast_of(source)) as events:
        await page.until(events, 0)
        for number in range(1, 6):
            source.set(number, **{f"n{number}": number})
            await page.until(events, number)
        assert page.items["more:n5"] == 5
        assert "more:n4" not in page.items
    assert page.kinds == ["snapshot", *["delta"] * 5]


async def test_nobody_is_asked_while_nobody_watches() -> None:
    source = Counter()
    broadcast = broadcast_of(source)
    await asyncio.sleep(0.02)
    assert source.asked == []
    async with browser(broadcast) as one:
        await anext(one)
        async with browser(broadcast) as two:
            await anext(two)
        assert broadcast.asks
    assert (broadcast.watching, broadcast.asks) == (0, False)
    asked = len(source.asked)
    await asyncio.sleep(0.02)
    assert len(source.asked) == asked
    # Who comes later asks for what is new alone.
    async with browser(broadcast) as later:
        await anext(later)
        while len(source.asked) == asked:
            await asyncio.sleep(0.001)
    assert source.asked[-1] is not None


async def test_all_browsers_share_one_question_and_one_event() -> None:
    source = Counter()
    broadcast = broadcast_of(source)
    pages = [Page() for _ in range(3)]
    async with browser(broadcast) as a, browser(broadcast) as b, browser(broadcast) as c:
        for page, events in zip(pages, (a, b, c), strict=True):
            await page.until(events, 0)
        source.set(1)
        told = [await anext(events) for events in (a, b, c)]
    assert told[0] is told[1] is told[2], "it is encoded once"


async def test_a_slow_browser_gets_what_it_missed_as_one_event() -> None:
    source, quick, slow = Counter(), Page(), Page()
    broadcast = broadcast_of(source)
    async with browser(broadcast) as fast_events, browser(broadcast) as slow_events:
        await quick.until(fast_events, 0)
        await slow.until(slow_events, 0)
        for number in range(1, 50):
            source.set(number)
            await quick.until(fast_events, number)
        slow.take(await anext(slow_events))
        assert slow.kinds == ["snapshot", "delta"]
        assert same_value(slow.items, quick.items)
        source.set(50)
        await slow.until(slow_events, 50)
        # What is kept is for one revision, and for no more browsers than there are.
        assert len(broadcast._events) <= 2


async def test_a_controller_that_does_not_answer_is_shown_and_asked_again() -> None:
    source, page = Counter(), Page()
    async with browser(broadcast_of(source)) as events:
        await page.until(events, 0)
        for error, words in (
            (NoAnswer("it restarts"), "it restarts"),
            (ZeroDivisionError("x"), "ZeroDivisionError: x"),
        ):
            source.fails = error
            while page.items["link"]["error"] != words:
                page.take(await anext(events))
            assert page.items["number"] is not None, "what was there stays"
        source.fails = None
        source.set(7)
        await page.until(events, 7)
        assert page.items["link"] == {"error": None}


async def test_another_controller_replaces_all_of_its_items_and_none_of_the_ingress() -> None:
    source, page = Counter(), Page()
    source.set(0, old=1)

    async def own() -> Mapping[str, Any]:
        return {"endpoint": 3}

    async with browser(broadcast_of(source, own)) as events:
        while "own:endpoint" not in page.items or "more:old" not in page.items:
            page.take(await anext(events))
        source.store = ItemStore(term=5)
        source.set(1)
        await page.until(events, 1)
        assert page.items.keys() == {"number", "link", "own:endpoint"}


async def test_beats_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast_module, "BEAT_S", 0.01)
    page = Page()
    async with browser(broadcast_of(Counter())) as events:
        for _ in range(3):
            page.take(await anext(events))
    assert page.kinds[-1] == "beat"


async def test_too_many_browsers_are_refused() -> None:
    broadcast = broadcast_of(Counter())
    for _ in range(broadcast_module.MOST_BROWSERS):
        broadcast.enter()
    with pytest.raises(Overloaded, match="32 browsers"):
        broadcast.enter()
    for _ in range(broadcast_module.MOST_BROWSERS):
        broadcast.leave()
    assert not broadcast.asks


async def test_streams_end_with_an_event() -> None:
    source, page = Counter(), Page()
    broadcast = broadcast_of(source)
    async with browser(broadcast) as events:
        await page.until(events, 0)
        broadcast.close()
        async for event in events:
            page.take(event)
    assert page.kinds[-1] == "end"
    assert not broadcast.asks
    async with browser(broadcast) as late:
        assert [event async for event in late] == [b"event: end\ndata: {}\n\n"]


async def test_a_failure_of_the_task_ends_the_streams_and_the_next_browser_starts_it_anew() -> None:
    source, page = Counter(), Page()
    broadcast = broadcast_of(source)
    async with browser(broadcast) as events:
        await page.until(events, 0)
        source.set(1, wrong=object())
        async for event in events:
            page.take(event)
    assert page.kinds[-1] != "end"
    assert not broadcast.asks


# ---- over HTTP ----------------------------------------------------------------------------------


async def test_events_over_http_until_the_server_ends() -> None:
    pool, page = ScriptedPool(layers=3, experts=8, hosts=2), Page()
    kinds: list[str] = []
    async with httpx.AsyncClient(timeout=10) as http:
        async with served_page(pool) as (url, broadcast):
            async with asyncio.timeout(10):
                while True:
                    try:
                        await http.get(f"{url}/")
                        break
                    except httpx.ConnectError:
                        await asyncio.sleep(0.01)
            stream = http.stream("GET", f"{url}/events")
            answer = await stream.__aenter__()
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-store"
            lines = answer.aiter_lines()
            while not page.items:
                event = f"{await anext(lines)}\n{await anext(lines)}\n{await anext(lines)}\n"
                page.take(event.encode())
            assert broadcast.watching == 1
        async for line in lines:
            kinds += re.findall(r"^event: (\w+)$", line)
        await stream.__aexit__(None, None, None)
    assert kinds[-1] == "end"
    assert (broadcast.watching, broadcast.asks) == (0, False)


async def test_a_browser_that_leaves_is_forgotten() -> None:
    pool = ScriptedPool(layers=1, experts=4, hosts=2)
    async with served_page(pool) as (url, broadcast), httpx.AsyncClient(timeout=10) as http:
        async with asyncio.timeout(10):
            while True:
                try:
                    async with http.stream("GET", f"{url}/events") as answer:
                        assert await anext(answer.aiter_lines()) == "event: snapshot"
                        assert broadcast.watching == 1
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.01)
            while broadcast.watching:
                await asyncio.sleep(0.01)
        assert not broadcast.asks
