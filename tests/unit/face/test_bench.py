"""`measure_load` has a limit of time, and tells what it did not reach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from moesaic import bench
from moesaic.clients.openai_wire import Chunk, Usage


class Endpoint:
    """Answers in ``answer_s`` seconds; the model is always the same."""

    answer_s = 0.0

    def __init__(self, url: str, **_: Any) -> None:
        self.streams = 0

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.streams == 0, "what did not end is closed"

    async def complete(self, prompt: list[int], **_: Any) -> None:
        assert prompt

    async def stream_complete(self, prompt: list[int], **_: Any) -> AsyncIterator[Chunk]:
        self.streams += 1
        try:
            await asyncio.sleep(self.answer_s)
            usage = Usage(prompt_tokens=len(prompt), completion_tokens=1)
            yield Chunk(text="x", usage=usage)
        finally:
            self.streams -= 1


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> type[Endpoint]:
    monkeypatch.setattr(bench, "AsyncClient", Endpoint)
    monkeypatch.setattr(Endpoint, "answer_s", 0.0)
    return Endpoint


async def test_all_requests_end_within_the_limit(endpoint: type[Endpoint]) -> None:
    found = await bench.measure_load("", model="m", concurrency=(1, 4), requests=6, limit_s=30.0)
    assert [(one.requests, one.unfinished) for one in found] == [(6, 0), (6, 0)]
    assert [one.prompt_tokens for one in found] == [6 * 32, 6 * 32]


async def test_a_run_that_reaches_its_part_of_the_limit_stops(endpoint: type[Endpoint]) -> None:
    endpoint.answer_s = 60.0
    began = asyncio.get_running_loop().time()
    found = await bench.measure_load("", model="m", concurrency=(2, 4), requests=8, limit_s=0.2)
    assert asyncio.get_running_loop().time() - began < 30.0
    assert [(one.requests, one.unfinished) for one in found] == [(0, 8), (0, 8)]
