"""Requests that lack an expert leave the batch, and go on where they were once it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

import pytest

from moesaic.actors.engine.engine import Sampling
from moesaic.cluster.routing.expert_options import MissingExpert
from moesaic.proto.errors import EngineError, ExpertUnavailable
from tests.helpers.pool.served_pool import PARK_S, ServedPool, save_served_model, served_pool
from tests.integration.router.test_missing_expert import without_experts

TOKENS = 12
GREEDY = Sampling(max_tokens=TOKENS)
FAIL = MissingExpert(mode="fail")
ONE = 0  # the expert that is taken away


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    with served_pool(save_served_model(tmp_path_factory.mktemp("model"))) as pool:
        yield pool


@pytest.fixture(scope="module")
def prompts(served: ServedPool) -> tuple[list[int], list[int]]:
    """One whose text needs the expert, and one whose text does not."""

    async def needs(prompt: list[int]) -> bool:
        try:
            await text(served, prompt, Sampling(max_tokens=TOKENS, missing=FAIL))
        except ExpertUnavailable:
            return True
        return False

    async def find() -> dict[bool, list[int]]:
        found: dict[bool, list[int]] = {}
        for token in range(3, 300):
            prompt = [token]
            found.setdefault(await needs(prompt), prompt)
            if len(found) == 2:
                return found
        raise AssertionError("all texts are alike")

    with without_experts(served, ONE):
        found = asyncio.run(find())
    return found[True], found[False]


async def text(served: ServedPool, prompt: Sequence[int], asked: Sampling = GREEDY) -> list[int]:
    return [token async for token in tokens(served, prompt, asked)]


async def tokens(
    served: ServedPool, prompt: Sequence[int], asked: Sampling
) -> AsyncGenerator[int, None]:
    async with aclosing(served.engine.generate("r", prompt, asked)) as deltas:
        async for delta in deltas:
            for token in delta.token_ids:
                yield token


async def parked(served: ServedPool, count: int) -> None:
    async with asyncio.timeout(PARK_S):
        while served.engine.stats().parked != count:
            await asyncio.sleep(0.01)


async def test_the_others_go_on(served: ServedPool, prompts: tuple[list[int], list[int]]) -> None:
    needy, free = prompts
    wanted = [await text(served, prompt) for prompt in prompts]
    with without_experts(served, ONE):
        waiting = asyncio.create_task(text(served, needy))
        await parked(served, 1)
        assert await text(served, free) == wanted[1]
        stats = served.engine.stats()
        assert (stats.parked, stats.waiting, stats.running) == (1, 1, 0)
        assert not waiting.done()
    assert await waiting == wanted[0]
    await parked(served, 0)


@pytest.mark.parametrize(
    "asked",
    [
        GREEDY,
        Sampling(max_tokens=TOKENS, temperature=1.0, seed=7),
        Sampling(
            max_tokens=TOKENS, temperature=0.8, seed=3, presence_penalty=1.5,
            frequency_penalty=0.5, repetition_penalty=1.3,
        ),
    ],
    ids=["greedy", "seed", "penalties"],
)  # fmt: skip
async def test_a_text_that_was_parked_in_its_middle_is_the_same(
    served: ServedPool, asked: Sampling
) -> None:
    """Its place in the random numbers, and what its penalties have counted, stay with it."""
    prompt = [*range(5, 37)]
    wanted = await text(served, prompt, asked)
    stream = tokens(served, prompt, asked)
    found = [await anext(stream) for _ in range(3)]
    with without_experts(served):
        rest = asyncio.create_task(_rest(stream))
        await parked(served, 1)
    assert found + await rest == wanted


async def _rest(stream: AsyncGenerator[int, None]) -> list[int]:
    return [token async for token in stream]


async def test_log_probabilities_of_a_parked_text(served: ServedPool) -> None:
    asked = Sampling(max_tokens=TOKENS, logprobs=2)

    async def chosen() -> list[tuple[int, float]]:
        async with aclosing(served.engine.generate("r", [9, 8, 7], asked)) as deltas:
            return [(one.token_id, one.logprob) async for delta in deltas for one in delta.logprobs]

    wanted = await chosen()
    with without_experts(served):
        waiting = asyncio.create_task(chosen())
        await parked(served, 1)
    found = await waiting
    assert [token for token, _ in found] == [token for token, _ in wanted]
    assert [p for _, p in found] == pytest.approx([p for _, p in wanted], abs=1e-5)


async def test_many_wait_and_all_come_back(served: ServedPool) -> None:
    asked = [[*range(5 + n, 15 + n)] for n in range(12)]
    wanted = [await text(served, prompt) for prompt in asked]
    with without_experts(served):
        waiting = [asyncio.create_task(text(served, prompt)) for prompt in asked]
        await parked(served, len(asked))
    assert await asyncio.gather(*waiting) == wanted


async def test_only_those_whose_time_is_over_fail(served: ServedPool) -> None:
    short = Sampling(max_tokens=TOKENS, missing=MissingExpert(wait_s=0.5))
    with without_experts(served):
        waiting = asyncio.create_task(text(served, [5, 6, 7]))
        with pytest.raises(ExpertUnavailable, match="expert"):
            await text(served, [5, 6, 7], short)
        await parked(served, 1)
    assert await waiting == await text(served, [5, 6, 7])


async def test_whoever_gives_up_leaves_nothing_behind(served: ServedPool) -> None:
    with without_experts(served):
        waiting = asyncio.create_task(text(served, [5, 6, 7]))
        await parked(served, 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert served.engine.stats().parked == 0


async def test_an_engine_that_closes_ends_the_parked(served: ServedPool) -> None:
    with served_pool(served.folder) as own, without_experts(own):
        waiting = asyncio.create_task(text(own, [5, 6, 7]))
        await parked(own, 1)
        own.engine.close()
        with pytest.raises(EngineError):
            await waiting
