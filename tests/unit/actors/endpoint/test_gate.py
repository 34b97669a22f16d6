"""How requests end when the service does: whole, or with an answer that says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest

from moesaic.actors.endpoint.http.gate import Gate
from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.engine.engine import Delta, RequestLimits, Sampling
from moesaic.actors.engine.served_model import ServedModel
from tests.helpers.endpoint.service import BODIES, TOKENIZER

ASKED: dict[str, Any] = {"model": "m", "prompt": "the", "max_tokens": 5}
LIMITS = RequestLimits(max_prompt_tokens=100, max_total_tokens=200, max_requests=8, vocab_size=320)


class Slow:
    """Five tokens, each when it is allowed."""

    def __init__(self) -> None:
        self.allowed = asyncio.Semaphore(0)
        self.cancelled = 0

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        whole = False
        try:
            for n in range(5):
                await self.allowed.acquire()
                whole = n == 4
                yield Delta((40 + n,), "length" if whole else None)
        finally:
            self.cancelled += not whole


class Served:
    def __init__(self, most: int = 4096) -> None:
        self.slow = Slow()
        self.gate = Gate(most)
        model = ServedModel("m", TOKENIZER, LIMITS, self.slow.generate)
        app = create_app(models={"m": model}, bodies=BODIES, gate=self.gate)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    def ask(self, **more: Any) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.http.post("/v1/completions", json={**ASKED, **more}))

    async def until_running(self, count: int) -> None:
        async with asyncio.timeout(5):
            while self.gate.running != count or self.slow.allowed._value:
                await asyncio.sleep(0.001)

    def go_on(self, tokens: int) -> None:
        for _ in range(tokens):
            self.slow.allowed.release()


def events(answer: httpx.Response) -> list[str]:
    return [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]


async def test_new_requests_are_refused_and_running_ones_end_whole() -> None:
    served = Served()
    running = [served.ask(), served.ask(stream=True)]
    await served.until_running(2)
    assert served.gate.drain(60.0) == 2
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/nowhere"):
        refused = await served.http.get(path)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-request-id"]
        assert refused.json()["error"]["code"] == "Ending"
    assert (await served.http.get("/readyz")).status_code == 503
    assert (await served.http.get("/readyz?model=m")).status_code == 503
    assert (await served.http.get("/livez")).status_code == 200
    assert (await served.http.get("/startupz")).status_code == 200
    assert served.gate.drain(0.0) == 2  # a second call takes nobody's time away
    served.go_on(10)
    whole, streamed = await asyncio.gather(*running)
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    assert events(streamed)[-1] == "[DONE]"
    assert served.gate.running == 0
    assert served.slow.cancelled == 0


async def test_what_takes_longer_ends_with_words_and_in_the_engine() -> None:
    served = Served()
    running = [served.ask(), served.ask(stream=True), served.ask(stream=True)]
    await served.until_running(3)
    served.go_on(4)  # of whichever come first
    await served.until_running(3)
    served.gate.drain(0.05)
    answers = await asyncio.gather(*running)
    for answer in answers:
        if answer.status_code == 200:  # begun: a stream
            *pieces, last = events(answer)
            assert all("choices" in json.loads(piece) for piece in pieces)
        else:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            last = answer.text
        error = json.loads(last)["error"]
        assert error["code"] == "Ending"
        assert "endpoint.drain_s" in error["message"]
    assert answers[0].status_code == 503
    assert served.gate.running == 0
    assert served.slow.cancelled == 3


async def test_a_body_that_does_not_come_ends_too() -> None:
    served = Served()

    async def body() -> AsyncGenerator[bytes, None]:
        yield b'{"model": '
        await asyncio.Event().wait()

    headers = {"content-length": "500"}
    asked = asyncio.create_task(
        served.http.post("/v1/completions", content=body(), headers=headers)
    )
    await served.until_running(1)
    served.gate.drain(0.05)
    assert (await asked).json()["error"]["code"] == "Ending"


async def test_no_time_at_all() -> None:
    served = Served()
    running = served.ask(stream=True)
    await served.until_running(1)
    served.gate.drain(0.0)
    assert (await running).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_a_flood_is_refused_and_probes_are_not(stream: bool) -> None:
    served = Served(most=2)
    running = [served.ask(stream=stream), served.ask(stream=stream)]
    await served.until_running(2)
    refused = await served.ask()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "Busy")
    assert (await served.http.get("/readyz")).status_code == 200
    served.go_on(10)
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200]
