"""The transformers engine on a tiny random Mixtral, fp32: same tokens, bounded, nobody hangs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import jsonschema
import pytest
from transformers import AddedToken, MixtralForCausalLM

from moesaic.actors.engine.engine import Delta, Engine, EngineConfig, Sampling
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.engine.transformers_backend.static_batching import StaticBatchLoop
from moesaic.actors.text.answer_form import AnswerForm
from moesaic.proto.errors import Busy, EngineError, RequestError
from tests.helpers.endpoint.engines import (
    SMALL,
    continuous,
    deltas,
    reference,
    running,
    tokens,
    until_idle,
)
from tests.helpers.models.tiny import tiny_mixtral, tiny_tokenizer

PROMPTS = [[(7 * n + 3 * k) % 300 + 3 for k in range(1 + 5 * n % 37)] for n in range(16)]


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return tiny_mixtral()


async def test_greedy_tokens_equal_generate_alone_and_together(model: MixtralForCausalLM) -> None:
    expected = [reference(model, prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)  # they can be told apart
    with running(model) as engine:
        alone = [await tokens(engine, prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*(tokens(engine, prompt) for prompt in PROMPTS))
    assert alone == expected
    assert together == expected


async def test_tokens_come_one_by_one_and_the_last_says_why(model: MixtralForCausalLM) -> None:
    with running(model) as engine:
        found = await deltas(engine, [5, 6, 7], Sampling(max_tokens=6))
    assert sum(len(delta.token_ids) for delta in found) == 6
    assert [delta.finish_reason for delta in found] == [None] * (len(found) - 1) + ["length"]
    assert len(found) > 1


async def test_the_end_token_ends_and_is_not_given_out(model: MixtralForCausalLM) -> None:
    free = reference(model, [5, 6, 7])
    end = free[9]
    ending = tiny_mixtral(eos_token_id=end)
    with running(ending) as engine:
        found = await deltas(engine, [5, 6, 7], Sampling(max_tokens=24))
        on_the_last = await deltas(engine, [5, 6, 7], Sampling(max_tokens=free.index(end) + 1))
    ids = [token_id for delta in found for token_id in delta.token_ids]
    assert ids == free[: free.index(end)]
    assert found[-1].finish_reason == "stop"
    assert on_the_last[-1].finish_reason == "stop"


@pytest.mark.parametrize("cohorts", [False, True])
@pytest.mark.parametrize("where", ["generation_config", "config", "tokenizer", "chat template"])
async def test_a_text_ends_by_whatever_names_its_end(
    model: MixtralForCausalLM, where: str, cohorts: bool
) -> None:
    free = reference(model, [5, 6, 7])
    end, other = free[9], next(token for token in range(3, 300) if token not in free)
    tokenizer = tiny_tokenizer(chat=False)
    names = tokenizer.convert_ids_to_tokens([end, other])
    ending = tiny_mixtral(eos_token_id=other)
    if where == "generation_config":
        ending.generation_config.eos_token_id = end
    elif where == "config":
        ending.config.eos_token_id = end
    elif where == "tokenizer":
        tokenizer.eos_token = names[0]
    else:
        tokenizer.eos_token = names[1]
        tokenizer.add_tokens([AddedToken(names[0], special=True)])
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}END{% endfor %}".replace(
            "END", names[0]
        )
    if cohorts:
        ending.config.attn_logit_softcapping = 50.0  # no packed batches, then
    engine = TransformersEngine(ending, config=SMALL, tokenizer=lambda: tokenizer)
    engine.start()
    try:
        assert isinstance(engine._loop, StaticBatchLoop) == cohorts
        found = await deltas(engine, [5, 6, 7], Sampling(max_tokens=24))
    finally:
        engine.close()
    assert [token for delta in found for token in delta.token_ids] == free[: free.index(end)]
    assert found[-1].finish_reason == "stop"


async def test_sampling_of_one_request_leaves_the_others_greedy(model: MixtralForCausalLM) -> None:
    greedy = reference(model, [5, 6, 7])
    hot = Sampling(max_tokens=24, temperature=2.0, top_p=0.95)
    with running(model) as engine:
        results = await asyncio.gather(
            tokens(engine, [5, 6, 7]),
            *(deltas(engine, [5, 6, 7], hot) for _ in range(4)),
            tokens(engine, [5, 6, 7]),
            # The smallest set that holds almost nothing is the best token alone.
            deltas(engine, [5, 6, 7], Sampling(max_tokens=24, temperature=2.0, top_p=1e-6)),
            deltas(engine, [5, 6, 7], Sampling(max_tokens=24, temperature=1e-300)),
        )
    flat = [
        [t for d in result for t in (d.token_ids if isinstance(d, Delta) else (d,))]
        for result in results
    ]
    assert flat[0] == flat[5] == flat[6] == flat[7] == greedy
    assert len({tuple(ids) for ids in flat[1:5]} | {tuple(greedy)}) == 5


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message", "param"),
    [
        ([], 4, "the prompt is empty", "prompt"),
        ([320], 4, "token id 320 is not in the vocabulary (0 to 319)", "prompt"),
        ([5, -1], 4, "token id -1 is not", "prompt"),
        ([5] * 512, 1, "the prompt has 512 tokens; at most 511 are", "prompt"),
        ([5] * 500, 13, "make 513; at most 512 are possible", "max_tokens"),
        ([5], 0, "max_tokens is 0", "max_tokens"),
    ],
)
async def test_refused_before_it_is_submitted(
    model: MixtralForCausalLM, prompt: list[int], max_tokens: int, message: str, param: str
) -> None:
    with running(model) as engine:
        with pytest.raises(RequestError) as caught:
            await deltas(engine, prompt, Sampling(max_tokens=max_tokens))
        assert message in str(caught.value)
        assert caught.value.param == param
        assert engine.stats().steps == 0
        assert await tokens(engine, [5], 3) == reference(model, [5], 3)


async def test_the_limit_is_the_cache_where_that_is_smaller(model: MixtralForCausalLM) -> None:
    with running(model, EngineConfig(page_size=8, num_blocks=6, max_batch_tokens=16)) as engine:
        assert engine.limits.max_total_tokens == 48
        longest = [(5 * k) % 300 + 3 for k in range(40)]
        assert await tokens(engine, longest, 8) == reference(model, longest, 8)
        with pytest.raises(RequestError, match="make 49; at most 48 are possible"):
            await tokens(engine, longest, 9)


async def test_requests_that_overflow_a_tiny_cache_together_all_finish(
    model: MixtralForCausalLM,
) -> None:
    # 48 tokens of cache; twelve requests of up to 48 each.
    config = EngineConfig(page_size=8, num_blocks=6, max_batch_tokens=16, max_requests=8)
    asked = [(ids, 48 - len(ids) - n) for n, ids in enumerate(PROMPTS[:12])]
    with running(model, config) as engine:
        found = await asyncio.gather(*(tokens(engine, ids, count) for ids, count in asked))
        assert engine.stats().restarts == 0
    assert found == [reference(model, ids, count) for ids, count in asked]


async def test_cancelling_all_that_run_frees_those_that_were_evicted(
    model: MixtralForCausalLM,
) -> None:
    """transformers alone would block new requests until one finishes: for ever, here."""
    config = EngineConfig(page_size=8, num_blocks=6, max_batch_tokens=16, max_requests=8)
    with running(model, config) as engine:
        first = [asyncio.ensure_future(tokens(engine, [7 + n], 47)) for n in range(6)]
        loop = continuous(engine)
        assert loop.batch_processor is not None
        scheduler = loop.batch_processor.scheduler
        async with asyncio.timeout(10):
            while not scheduler.block_new_requests:
                await asyncio.sleep(0.001)
        with loop.pause():
            active = {int(key.split("#")[1]) for key in scheduler.active_requests}
            for n in active:
                first[n].cancel()
            await asyncio.wait([first[n] for n in active])
        evicted = [n for n in range(6) if n not in active]
        assert evicted
        found = await asyncio.gather(*(first[n] for n in evicted))
    assert found == [reference(model, [7 + n], 47) for n in evicted]


async def test_those_that_wait_go_by_priority_and_then_by_arrival(
    model: MixtralForCausalLM,
) -> None:
    ended: list[int] = []

    async def ask(engine: Engine, n: int, priority: int) -> None:
        asked = Sampling(max_tokens=3, priority=priority)
        async with aclosing(engine.generate("r", [5, n], asked)) as deltas:
            async for _ in deltas:
                pass
        ended.append(n)

    with running(model, EngineConfig(max_requests=1)) as engine:
        loop = continuous(engine)
        with loop.pause():
            asked = [
                asyncio.create_task(ask(engine, n, priority))
                for n, priority in enumerate((0, 5, 0, -1, 5))
            ]
            await asyncio.sleep(0)  # each submits its request at its first step
        await asyncio.gather(*asked)
    assert ended == [3, 0, 2, 1, 4]


async def test_too_many_requests_are_refused_and_the_others_served(
    model: MixtralForCausalLM,
) -> None:
    config = EngineConfig(page_size=8, num_blocks=64, max_requests=2, max_waiting=2)
    with running(model, config) as engine:
        results = await asyncio.gather(
            *(tokens(engine, [5, n], 8) for n in range(7)), return_exceptions=True
        )
        assert [isinstance(result, Busy) for result in results] == [False] * 4 + [True] * 3
        assert await tokens(engine, [5, 6], 8) == reference(model, [5, 6], 8)


async def test_closing_the_iterator_cancels(model: MixtralForCausalLM) -> None:
    with running(model) as engine:
        async with aclosing(engine.generate("a", [5], Sampling(max_tokens=500))) as stream:
            await anext(stream)
            assert engine.stats().running == 1
        await until_idle(engine)
        steps = engine.stats().steps
        assert steps < 400
        assert engine.stats().cache_free == pytest.approx(1.0, abs=0.1)


async def test_cancelling_the_task_cancels_and_the_others_go_on(model: MixtralForCausalLM) -> None:
    with running(model) as engine:
        doomed = [asyncio.ensure_future(tokens(engine, [9, n], 500)) for n in range(4)]
        kept = asyncio.ensure_future(tokens(engine, [5, 6], 40))
        async with asyncio.timeout(10):
            while engine.stats().running < 5:
                await asyncio.sleep(0.001)
        for task in doomed:
            task.cancel()
        assert await kept == reference(model, [5, 6], 40)
        await until_idle(engine)


async def test_one_id_twice_at_the_same_time(model: MixtralForCausalLM) -> None:
    with running(model) as engine:
        found = await asyncio.gather(tokens(engine, [5]), tokens(engine, [6]))
    assert found == [reference(model, [5]), reference(model, [6])]


def test_callers_in_several_threads(model: MixtralForCausalLM) -> None:
    found: dict[int, list[int]] = {}
    with running(model) as engine:

        def call(n: int) -> None:
            found[n] = asyncio.run(tokens(engine, [n, 5]))

        threads = [threading.Thread(target=call, args=(n,)) for n in range(3, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {n: reference(model, [n, 5]) for n in range(3, 7)}


def test_an_event_loop_that_ends_early_harms_nobody(model: MixtralForCausalLM) -> None:
    async def abandon(engine: Engine) -> None:
        stream = engine.generate("a", [5], Sampling(max_tokens=500))
        await anext(stream)
        await stream.aclose()

    with running(model) as engine:
        asyncio.run(abandon(engine))
        assert asyncio.run(tokens(engine, [5, 6])) == reference(model, [5, 6])


async def test_close_leaves_no_thread_and_ends_what_runs(model: MixtralForCausalLM) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        engine = TransformersEngine(model, config=SMALL)
        engine.start()
        task = asyncio.ensure_future(tokens(engine, [5], 500))
        async with asyncio.timeout(10):
            while not engine.stats().steps:
                await asyncio.sleep(0.001)
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            await task
        with pytest.raises(EngineError, match="not running"):
            await tokens(engine, [5])
        engine.close()
        assert engine.stats().healthy is False
    assert set(threading.enumerate()) == before


def test_an_engine_that_was_not_started_says_so() -> None:
    engine: Engine = TransformersEngine(tiny_mixtral())
    with pytest.raises(EngineError, match="not started"):
        _ = engine.limits
    assert engine.stats().healthy is False


async def test_answers_of_a_json_schema_alone_and_together() -> None:
    """A random model says what the schema leaves it to say; the others are not touched."""
    model = tiny_mixtral(eos_token_id=2)
    tokenizer = tiny_tokenizer()
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    plain = [PROMPTS[1], PROMPTS[2]]
    engine = TransformersEngine(model, tokenizer=lambda: tokenizer)
    engine.start()

    async def answer(prompt: Sequence[int], asked: Sampling) -> str:
        async with aclosing(engine.generate("r", prompt, asked)) as deltas:
            found = [delta async for delta in deltas]
        assert found[-1].finish_reason == "stop"
        ids = [token for delta in found for token in delta.token_ids]
        return str(tokenizer.decode(ids))

    asked = [
        Sampling(
            max_tokens=100, temperature=t, seed=n, form=AnswerForm(json_schema=json.dumps(schema))
        )
        for n, t in enumerate((0.0, 1.0, 1.0))
    ]
    try:
        alone = [await answer(PROMPTS[0], one) for one in asked]
        together = await asyncio.gather(
            *(answer(PROMPTS[0], one) for one in asked), *(tokens(engine, ids, 8) for ids in plain)
        )
        with pytest.raises(RequestError, match="response_format"):
            wrong = AnswerForm(json_schema='{"type": "nothing"}')
            await answer(PROMPTS[0], replace(asked[0], form=wrong))
    finally:
        engine.close()
    assert list(together[:3]) == alone
    assert list(together[3:]) == [reference(model, ids, 8) for ids in plain]
    for text in alone:
        jsonschema.validate(json.loads(text), schema)
    with (
        running(model) as without,
        pytest.raises(RequestError, match="not supported by this engine"),
    ):
        async with aclosing(without.generate("r", [5], asked[0])) as deltas:
            await anext(deltas)
