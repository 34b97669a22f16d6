"""A transformers engine over a tiny model, and what it should say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, MixtralForCausalLM

from moesaic.actors.engine.engine import Delta, Engine, EngineConfig, Sampling
from moesaic.actors.engine.transformers_backend.continuous_batching import BatchingLoop
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from tests.helpers.models.tiny import tiny_mixtral

SMALL = EngineConfig(page_size=8, num_blocks=64, max_batch_tokens=32, max_requests=16)


def tiny_engine() -> Engine:
    """For a trunk in a process of its own."""
    return TransformersEngine(tiny_mixtral(max_positions=4096), config=EngineConfig(num_blocks=256))


@contextmanager
def running(
    model: MixtralForCausalLM | LlamaForCausalLM, config: EngineConfig = SMALL
) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, config=config)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def deltas(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> list[Delta]:
    async with asyncio.timeout(60):
        return [delta async for delta in engine.generate("test", prompt, sampling)]


async def tokens(engine: Engine, prompt: Sequence[int], max_tokens: int = 24) -> list[int]:
    found = await deltas(engine, prompt, Sampling(max_tokens=max_tokens))
    return [token_id for delta in found for token_id in delta.token_ids]


def reference(
    model: MixtralForCausalLM | LlamaForCausalLM, prompt: Sequence[int], max_tokens: int = 24
) -> list[int]:
    ids = torch.tensor([list(prompt)])
    whole = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return whole[0, len(prompt) :].tolist()


def continuous(engine: TransformersEngine) -> BatchingLoop:
    """Its loop, inside."""
    loop = engine._loop
    assert isinstance(loop, BatchingLoop)
    return loop


async def until_idle(engine: TransformersEngine) -> None:
    async with asyncio.timeout(10):
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.005)
