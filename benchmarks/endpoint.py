"""The endpoint against the engine called directly: time to the first token, and tokens/s.

    python -m benchmarks.endpoint [--json PATH]

Both use the same two hosts of one cluster: the endpoint through HTTP, ingress and trunk, the
engine with a trunk in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median

import openai
import torch
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.decode import CONFIG, prompts_of
from benchmarks.measure import Comparison, report
from moesaic.actors.engine import Sampling
from moesaic.actors.transformers_engine import TransformersEngine
from moesaic.models.demo import demo_model

NEW_TOKENS = 32
CONCURRENCY = (1, 8, 32)
# One request: seconds to its first token.
Ask = Callable[[Sequence[int]], Awaitable[float]]


async def together(ask: Ask, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(seconds per token of all requests, median seconds to a first token)."""
    start = time.perf_counter()
    firsts = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    return (time.perf_counter() - start) / (len(prompts) * NEW_TOKENS), median(firsts)


def over_http(client: openai.AsyncOpenAI) -> Ask:
    async def ask(prompt: Sequence[int]) -> float:
        start, first = time.perf_counter(), 0.0
        stream = await client.completions.create(
            model="demo", prompt=list(prompt), max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
        async for _ in stream:
            first = first or time.perf_counter() - start
        return first

    return ask


def directly(engine: TransformersEngine) -> Ask:
    async def ask(prompt: Sequence[int]) -> float:
        start, first = time.perf_counter(), 0.0
        stream: AsyncIterator = engine.generate("r", prompt, Sampling(max_tokens=NEW_TOKENS))
        async for _ in stream:
            first = first or time.perf_counter() - start
        return first

    return ask


async def measure(url: str, engine: TransformersEngine, rounds: int) -> list[Comparison]:
    prompts = prompts_of(demo_model())
    found = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        asks = {"endpoint": over_http(client), "engine": directly(engine)}
        for ask in asks.values():
            await together(ask, prompts[:2])
        for concurrency in CONCURRENCY:
            times = {name: ([], []) for name in asks}
            for _ in range(rounds):
                for name, ask in asks.items():
                    per_token, first = await together(ask, prompts[:concurrency])
                    times[name][0].append(per_token)
                    times[name][1].append(first)
            for index, what in enumerate(("s/token", "first token")):
                ours, base = times["endpoint"][index], times["engine"][index]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    spec = {
        "name": "benchmark",
        "models": [{"name": "demo", "path": "demo", "dtype": "bfloat16"}],
        "hosts": [{"count": 2}],
        "endpoint": {"port": 0},
    }
    with moesaic.up(spec) as cluster:
        engine = TransformersEngine(cluster.from_pretrained("demo"), config=CONFIG)
        engine.start()
        try:
            found = asyncio.run(measure(cluster.url or "", engine, arguments.rounds))
        finally:
            engine.close()
    report("The endpoint against its engine, demo model, bfloat16", found, arguments.json)


if __name__ == "__main__":
    main()
