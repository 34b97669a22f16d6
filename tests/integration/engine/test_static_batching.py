"""Models that transformers' continuous batching does not take, or takes: the engine's texts are
those of `generate`, request by request, in fp32."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moesaic.actors.engine.engine import EngineConfig, Sampling
from moesaic.actors.engine.sampling import RequestSampler
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.engine.transformers_backend.static_batch import BatchedRequest, together
from moesaic.actors.engine.transformers_backend.static_batching import StaticBatchLoop
from moesaic.cluster.routing.expert_options import MissingExpert
from moesaic.proto.errors import EngineError, ExpertUnavailable, MoesaicError
from tests.helpers.effort import ALL
from tests.helpers.endpoint.engines import running, until_idle
from tests.helpers.models.architectures import ARCHITECTURES, tiny_model
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.pool.served_pool import served_pool
from tests.integration.router.test_missing_expert import without_experts

TOKENS = 12
# Of mixed lengths; 16 requests at the same time.
PROMPTS = [[(7 * n + 3 * k) % 90 + 3 for k in range(1 + 5 * n % 29)] for n in range(16)]


def unending(model: Any) -> Any:
    for config in (model.generation_config, model.config.get_text_config()):
        config.eos_token_id = None
    return model


def by_generate(model: Any, prompt: Sequence[int], tokens: int = TOKENS) -> list[int]:
    ids = torch.tensor([list(prompt)])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return whole[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


async def text(engine: TransformersEngine, prompt: Sequence[int], asked: Sampling) -> list[int]:
    async with aclosing(engine.generate("r", prompt, asked)) as deltas:
        return [token async for delta in deltas for token in delta.token_ids]


async def texts(
    engine: TransformersEngine, asked: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS
) -> list[list[int]]:
    return await asyncio.gather(*(text(engine, prompt, asked) for prompt in prompts))


def tiny_switch(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=4, expert_capacity=64, pad_token_id=0, router_jitter_noise=0.0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return unending(model.eval())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
async def test_every_architecture_alone_and_together(name: str) -> None:
    model = unending(tiny_model(name))
    prompts = PROMPTS if ALL else PROMPTS[::4]
    expected = [by_generate(model, prompt) for prompt in prompts]
    with running(model) as engine:
        found = await texts(engine, Sampling(max_tokens=TOKENS), prompts)
        assert engine.stats().restarts == 0
    assert found == expected


async def test_an_encoder_and_a_decoder() -> None:
    model = tiny_switch()
    expected = [by_generate(model, prompt) for prompt in PROMPTS]
    with running(model) as engine:
        assert await texts(engine, Sampling(max_tokens=TOKENS)) == expected


@pytest.mark.parametrize(
    ("tokens", "most", "pads", "expected"),
    [
        ([5, 7, 3], 100, True, 3),
        ([5, 7, 3], 14, True, 2),
        ([5, 7, 3], 4, True, 1),
        ([5, 7, 5], 100, False, 1),
        ([5, 5, 7], 100, False, 2),
        ([7, 5], 100, False, 1),
    ],
)
def test_who_may_be_one_cohort(
    mla: Any, tokens: list[int], most: int, pads: bool, expected: int
) -> None:
    asked = Sampling(max_tokens=1)
    requests = [
        BatchedRequest(str(n), [1] * count, 1, RequestSampler(asked, [1]))
        for n, count in enumerate(tokens)
    ]
    assert together(mla, requests, most, pads=pads) == expected


@pytest.fixture(scope="module")
def mla() -> Any:
    return unending(tiny_model("deepseek_v2"))


@pytest.fixture
def engine(mla: Any) -> Iterator[TransformersEngine]:
    with running(mla, EngineConfig(num_blocks=64, max_requests=8, max_batch_tokens=64)) as engine:
        assert isinstance(engine._loop, StaticBatchLoop)
        yield engine


async def test_lengths_seeds_and_ends(mla: Any, engine: TransformersEngine) -> None:
    """More requests than rows, each with a length of its own."""
    expected = [by_generate(mla, prompt, 3 + n) for n, prompt in enumerate(PROMPTS)]
    found = await asyncio.gather(
        *(text(engine, prompt, Sampling(max_tokens=3 + n)) for n, prompt in enumerate(PROMPTS))
    )
    assert found == expected
    seeded = Sampling(max_tokens=TOKENS, temperature=1.0, seed=5)
    alone = [await text(engine, prompt, seeded) for prompt in PROMPTS[:4]]
    assert (await texts(engine, seeded))[:4] == alone
    await until_idle(engine)  # the last cohort leaves after its last token was sent
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_free) == (0, 0, 1.0)


async def test_who_goes_away_frees_its_place(engine: TransformersEngine, mla: Any) -> None:
    stream = engine.generate("a", [5, 6], Sampling(max_tokens=120))
    await anext(stream)
    assert engine.stats().running == 1
    await stream.aclose()
    await until_idle(engine)
    assert await text(engine, [7], Sampling(max_tokens=5)) == by_generate(mla, [7], 5)


async def test_rows_that_fail_end_their_own_request_alone(
    mla: Any, engine: TransformersEngine
) -> None:
    expected = [by_generate(mla, prompt) for prompt in PROMPTS]
    loop = engine._loop
    assert isinstance(loop, StaticBatchLoop)
    failed: list[int] = []

    def fail(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cohort = loop._current
        if cohort is not None and not failed and len(cohort.requests) > 2:
            failed.append(len(cohort.requests[1].prompt_ids))
            engine.fail_rows([cohort.rows_each], ExpertUnavailable("expert 1 of layer 1"))

    hook = mla.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        found = await asyncio.gather(
            *(text(engine, prompt, Sampling(max_tokens=TOKENS)) for prompt in PROMPTS),
            return_exceptions=True,
        )
    finally:
        hook.remove()
    assert [isinstance(one, ExpertUnavailable) for one in found].count(True) == 1
    good = [(a, b) for a, b in zip(found, expected, strict=True) if not isinstance(a, Exception)]
    assert len(good) == 15
    assert all(a == b for a, b in good)


async def test_a_step_that_fails_ends_its_cohort_and_the_engine_goes_on(
    mla: Any, engine: TransformersEngine
) -> None:
    def fail(module: Any, args: Any) -> None:
        raise ValueError("a defect")

    hook = mla.register_forward_pre_hook(fail)
    try:
        with pytest.raises(EngineError, match="a defect"):
            await text(engine, [5], Sampling(max_tokens=5))
    finally:
        hook.remove()
    assert await text(engine, [7], Sampling(max_tokens=5)) == by_generate(mla, [7], 5)
    stats = engine.stats()
    assert stats.restarts == 1
    assert stats.healthy


async def test_close_ends_what_runs(mla: Any) -> None:
    with running(mla) as engine:
        stream = engine.generate("a", [5], Sampling(max_tokens=100))
        await anext(stream)
        engine.close()
        with pytest.raises(MoesaicError):
            async for _ in stream:
                pass


@pytest.mark.parametrize("name", ["deepseek_v2", "switch_transformers"])
async def test_over_a_pool_with_parking(name: str, tmp_path: Path) -> None:
    model = unending(tiny_model(name, vocab_size=320, max_position_embeddings=256))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    expected = [by_generate(model, prompt) for prompt in PROMPTS]
    asked = Sampling(max_tokens=TOKENS)
    with served_pool(tmp_path) as served:
        engine = served.engine
        assert isinstance(engine._loop, StaticBatchLoop)
        assert await texts(engine, asked) == expected
        dropping = replace(asked, missing=MissingExpert(mode="drop"))
        failing = replace(asked, missing=MissingExpert(mode="fail"))
        with without_experts(served):
            waiting = asyncio.create_task(text(engine, PROMPTS[3], asked))
            async with asyncio.timeout(5):
                while engine.stats().parked != 1:
                    await asyncio.sleep(0.01)
            with pytest.raises(ExpertUnavailable):
                await text(engine, PROMPTS[4], failing)
            async with aclosing(engine.generate("r", PROMPTS[5], dropping)) as deltas:
                last = [delta async for delta in deltas][-1]
            assert last.dropped is not None
            assert not waiting.done()
        assert await waiting == expected[3]
