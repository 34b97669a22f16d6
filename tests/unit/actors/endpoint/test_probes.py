"""What stands before an engine and tells probes of it: `/livez`, `/readyz`, `/startupz`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from moesaic.actors.endpoint.http import health as health_file
from moesaic.actors.endpoint.http.health import Health, ModelHealth
from moesaic.actors.endpoint.http.probes import add_health
from moesaic.actors.endpoint.model_names import ModelNames
from moesaic.actors.engine.engine import Delta, Pooling, Sampling
from moesaic.cluster.service.progress import STALLED_S, ModelProgress, TrunkHeartbeat
from moesaic.proto.errors import Busy, EngineError, UnknownModel

ASKED = Sampling(max_tokens=9)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Gives a token for each that is allowed, and fails with ``error`` behind them."""

    def __init__(self) -> None:
        self.allowed = asyncio.Semaphore(0)
        self.error: Exception | None = None

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        while True:
            await self.allowed.acquire()
            if self.error is not None:
                raise self.error
            yield Delta((1,))

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, request_id: str
    ) -> Any:
        await self.allowed.acquire()
        if self.error is not None:
            raise self.error
        return None


async def http_get(health: Health, path: str) -> httpx.Response:
    app = FastAPI()
    add_health(app, health)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def test_frozen_full_and_idle_models_side_by_side() -> None:
    clock = Clock()
    models = {name: ModelHealth(clock=clock) for name in ("frozen", "full", "idle")}
    engines = {name: Engine() for name in models}
    health = Health(ModelNames(models, {"full": ["team/full"]}))
    streams = [
        models[name].watch(engines[name].generate)("a", [1], ASKED)
        for name, count in (("frozen", 1), ("full", 50))
        for _ in range(count)
    ]
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.sleep(0)

    async def answers() -> list[int]:
        names = ("frozen", "full", "team/full", "idle")
        found = [await http_get(health, f"/readyz?model={name}") for name in names]
        return [one.status_code for one in (*found, await http_get(health, "/readyz"))]

    assert await answers() == [200] * 5
    clock.now = STALLED_S
    engines["full"].allowed.release()  # a token for one of fifty
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert await answers() == [503, 200, 200, 200, 503]
    # Whoever asks whether the process lives is told so all the same.
    assert (await http_get(health, "/livez")).status_code == 200
    assert (await http_get(health, "/startupz")).status_code == 200
    engines["frozen"].allowed.release()
    await waiting[0]
    assert await answers() == [200] * 5
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for stream in streams:
        await stream.aclose()


async def test_a_refusal_is_no_loss_and_a_lost_trunk_is_one() -> None:
    clock = Clock()
    engine, model = Engine(), ModelHealth(clock=clock)

    async def fails(error: Exception) -> None:
        engine.error = error
        engine.allowed.release()
        with pytest.raises(type(error)):
            await anext(model.watch(engine.generate)("a", [1], ASKED))

    await fails(Busy("full"))
    clock.now += 1000
    assert model.is_ready
    await fails(EngineError("the trunk was lost"))
    assert model.is_ready
    clock.now += STALLED_S
    assert not model.is_ready
    engine.error = None
    engine.allowed.release()
    await model.watch_embed(engine.embed)([[1]], Pooling(), "a")
    assert model.is_ready


async def test_the_engine_is_asked_beside_the_probes_and_only_while_work_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_file, "LOOK_S", 0.001)
    monkeypatch.setattr(health_file, "HEAR_S", 0.01)
    clock, engine = Clock(), Engine()
    asked, steps = 0, 0
    answers = False

    async def hear() -> TrunkHeartbeat | None:
        nonlocal asked, steps
        asked += 1
        if not answers:
            await asyncio.Event().wait()  # frozen
        steps += 1
        return TrunkHeartbeat(trunk="a", steps=steps, busy=True, beats=True)

    model = ModelHealth(ModelProgress(), hear, clock=clock)
    health = Health({"m": model})
    stream = model.watch(engine.generate)("a", [1], ASKED)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.02)
    assert asked == 0  # it has not waited for long
    clock.now = STALLED_S
    async with asyncio.timeout(5):
        while asked < 3:
            await asyncio.sleep(0.001)
    assert not await health.ready("m")
    answers = True
    async with asyncio.timeout(5):
        while not await health.ready("m"):
            await asyncio.sleep(0.001)
    engine.allowed.release()
    await waiting
    await stream.aclose()
    await asyncio.sleep(0.02)
    before, clock.now = asked, 1e6
    await asyncio.sleep(0.02)
    assert asked == before
    assert await health.ready()


async def test_a_probe_has_an_idle_trunk_asked_and_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_file, "LOOK_S", 0.001)
    monkeypatch.setattr(health_file, "HEAR_S", 0.01)
    clock, asked, frozen = Clock(), 0, True

    async def hear() -> TrunkHeartbeat | None:
        nonlocal asked
        asked += 1
        if frozen:
            await asyncio.Event().wait()
        return TrunkHeartbeat(trunk="a", steps=1, busy=False, beats=True)

    model = ModelHealth(ModelProgress(), hear, clock=clock)
    asleep = ModelHealth(ModelProgress(wake_s=60.0), hear, clock=clock)
    health = Health({"m": model, "asleep": asleep})
    await asyncio.sleep(0.02)
    assert asked == 0  # nobody wanted to know
    assert await health.ready("asleep")
    assert await health.ready("m")
    clock.now += STALLED_S
    async with asyncio.timeout(5):
        while asked < 3:
            await asyncio.sleep(0.001)
    assert not await health.ready("m")
    assert await health.ready("asleep")
    frozen = False
    async with asyncio.timeout(5):
        while not await health.ready("m"):
            await asyncio.sleep(0.001)


async def test_who_leaves_is_not_ready_and_who_is_not_known_is_not_there() -> None:
    leaving = False
    health = Health({"m": ModelHealth()}, leaving=lambda: leaving)
    assert (await http_get(health, "/readyz")).status_code == 200
    leaving = True
    assert (await http_get(health, "/readyz?model=m")).status_code == 503
    assert (await http_get(health, "/livez")).status_code == 200
    with pytest.raises(UnknownModel):
        await health.ready("other")
    for name in ("other", "", "%00", "m%20"):
        assert (await http_get(health, f"/readyz?model={name}")).status_code == 404
