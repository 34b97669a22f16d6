"""The endpoint against the engine called directly: time to the first token and between tokens,
tokens/s; and two trunks against one.

    python -m benchmarks.speed.endpoint [--json PATH]

Both use the same two hosts of one cluster: the endpoint through HTTP, ingress and trunk, the
engine with a trunk in this process. Two trunks are a second cluster, behind the first. They share
the machine's cores: where one trunk keeps them busy, a second brings nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openai
import torch
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import Comparison, report
from benchmarks.speed.decode import CONFIG
from benchmarks.streams import prompts_of
from moesaic.actors.engine.engine import Sampling
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.models.upcycling.demo import demo_model

NEW_TOKENS = 32
CONCURRENCY = (1, 8, 32)
# One request: seconds to its first token, and from each to the next.
Ask = Callable[[Sequence[int]], Awaitable[list[float]]]
MEASURED = ("s/token", "first token", "p99 between tokens")


async def together(ask: Ask, prompts: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """What `MEASURED` names: seconds per token of all requests, the median of their first tokens,
    and the 99th percentile of all later ones."""
    start = time.perf_counter()
    found = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    took_s = time.perf_counter() - start
    gaps_s = [gap for waits_s in found for gap in waits_s[1:]]
    return (
        took_s / (len(prompts) * NEW_TOKENS),
        median(waits_s[0] for waits_s in found),
        float(np.percentile(gaps_s, 99)),
    )


async def waits(start: float, pieces: AsyncIterator[object]) -> list[float]:
    """Seconds until each piece, from the one before or, the first, from ``start``."""
    found: list[float] = []
    async for _ in pieces:
        now = time.perf_counter()
        found.append(now - start)
        start = now
    return found


def over_http(client: openai.AsyncOpenAI) -> Ask:
    async def ask(prompt: Sequence[int]) -> list[float]:
        start = time.perf_counter()
        stream = await client.completions.create(
            model="demo", prompt=list(prompt), max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
        return await waits(start, aiter(stream))

    return ask


def directly(engine: TransformersEngine) -> Ask:
    async def ask(prompt: Sequence[int]) -> list[float]:
        start = time.perf_counter()
        return await waits(start, engine.generate("r", prompt, Sampling(max_tokens=NEW_TOKENS)))

    return ask


async def measure(url: str, engine: TransformersEngine, rounds: int) -> list[Comparison]:
    prompts = prompts_of(demo_model())
    found = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        asks = {"endpoint": over_http(client), "engine": directly(engine)}
        for ask in asks.values():
            await together(ask, prompts[:2])
        for concurrency in CONCURRENCY:
            times = {name: list[tuple[float, float, float]]() for name in asks}
            for _ in range(rounds):
                for name, ask in asks.items():
                    times[name].append(await together(ask, prompts[:concurrency]))
            for index, what in enumerate(MEASURED):
                ours = [one[index] for one in times["endpoint"]]
                base = [one[index] for one in times["engine"]]
                found.append(
                    Comparison(
                        case=f"{concurrency} at once, {what}",
                        ours="endpoint",
                        base="engine",
                        seconds={"endpoint": median(ours), "engine": median(base)},
                        ratio=median(o / b for o, b in zip(ours, base, strict=True)),
                    )
                )
    return found


async def s_per_token(url: str, rounds: int) -> float:
    """Of the endpoint at the largest concurrency: the median of the rounds."""
    prompts = prompts_of(demo_model())[: CONCURRENCY[-1]]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        ask = over_http(client)
        await together(ask, prompts)
        return median([(await together(ask, prompts))[0] for _ in range(rounds)])


def spec(trunks: int) -> dict[str, Any]:
    return {
        "name": "benchmark",
        "models": [{"name": "demo", "path": "demo", "dtype": "bfloat16"}],
        "hosts": [{"count": 2}],
        "trunk": {"min_replicas": trunks, "max_replicas": trunks},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    rounds = arguments.rounds
    with moesaic.up(spec(trunks=1)) as cluster:
        engine = TransformersEngine(cluster.from_pretrained("demo"), config=CONFIG)
        engine.start()
        try:
            found = asyncio.run(measure(cluster.url or "", engine, rounds))
        finally:
            engine.close()
        one = asyncio.run(s_per_token(cluster.url or "", rounds))
    with moesaic.up(spec(trunks=2)) as cluster:
        two = asyncio.run(s_per_token(cluster.url or "", rounds))
    found.append(
        Comparison(
            case=f"{CONCURRENCY[-1]} at once, s/token",
            ours="two trunks",
            base="one",
            seconds={"two trunks": two, "one": one},
            ratio=two / one,
        )
    )
    report("The endpoint against its engine, demo model, bfloat16", found, arguments.json)


if __name__ == "__main__":
    main()
