"""Vectors: plain transformers' last hidden states, over a pool, beside texts, over HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic import AsyncClient, Client
from moesaic.actors.engine.engine import EngineConfig, Pooling, Sampling
from moesaic.actors.serve.replica.trunk import ErrorValue, Trunk
from moesaic.proto.errors import Busy, EngineError, ExpertUnavailable, RequestError
from tests.helpers.endpoint.engines import running, tokens
from tests.helpers.endpoint.scripted import scripted_engine
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.pool.served_pool import ServedPool, save_served_model, served_pool
from tests.integration.engine.test_static_batching import by_generate, tiny_switch, unending
from tests.integration.router.test_missing_expert import without_experts

PROMPTS = [[(7 * n + 3 * k) % 90 + 3 for k in range(1 + 5 * n % 29)] for n in range(9)]
PLAIN = Pooling(normalize=False)


def plainly(model: Any, prompts: Sequence[Sequence[int]], kind: str = "last") -> np.ndarray:
    """By the model itself, one by one; (N, H)."""
    with torch.no_grad():
        found = [model.base_model(torch.tensor([list(p)])).last_hidden_state[0] for p in prompts]
    return torch.stack([x[-1] if kind == "last" else x.mean(0) for x in found]).numpy()


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


# Continuous batches with and without sinks and windows, latent attention, linear attention.
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("mixtral", "sdpa"),
        ("mixtral", "eager"),
        ("gpt_oss", "eager"),
        ("gemma4_text", "sdpa"),
        ("gemma4_text", "eager"),
        ("deepseek_v2", "sdpa"),
        ("qwen3_next", "sdpa"),
    ],
)
async def test_vectors_are_those_of_plain_transformers(name: str, attention: str) -> None:
    model = unending(tiny_model(name))
    model.set_attn_implementation(attention)
    last, mean = plainly(model, PROMPTS), plainly(model, PROMPTS, "mean")
    texts = [by_generate(model, prompt, 5) for prompt in PROMPTS[:3]]
    with running(model, EngineConfig(num_blocks=64, max_batch_tokens=64)) as engine:
        # Of mixed lengths and together, while texts are generated.
        asked = asyncio.gather(*(tokens(engine, prompt, 5) for prompt in PROMPTS[:3]))
        assert_near(await engine.embed(PROMPTS, PLAIN), last)
        assert await asked == texts
        alone = [await engine.embed([prompt], PLAIN) for prompt in PROMPTS]
        assert_near(np.concatenate(alone), last)
        assert_near(await engine.embed(PROMPTS, Pooling(kind="mean", normalize=False)), mean)
        lengths = np.linalg.norm(last, axis=1, keepdims=True)
        assert_near(await engine.embed(PROMPTS, Pooling()), last / lengths)
        assert engine.stats().restarts == 0


async def test_a_model_with_an_encoder_is_refused() -> None:
    refused = pytest.raises(RequestError, match="has no last hidden state")
    with running(tiny_switch()) as engine, refused as caught:
        await engine.embed([[3]], PLAIN)
    assert caught.value.param == "model"


async def test_an_engine_that_ends_and_one_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(unending(tiny_model("mixtral"))) as engine:
        # Nobody steps: what waits is told when the engine ends.
        monkeypatch.setattr(engine._encoder, "step", lambda: None)
        waiting = asyncio.create_task(engine.embed([[3], [4]], PLAIN))
        while not engine._encoder.waits:
            await asyncio.sleep(0)
        monkeypatch.setattr(engine, "_embedding", engine.limits.max_requests)
        with pytest.raises(Busy):
            await engine.embed([[3]], PLAIN)
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting
        with pytest.raises(EngineError):
            await engine.embed([[3]], PLAIN)


async def test_an_engine_without_vectors_says_so() -> None:
    trunk: Any = Trunk.func_or_class
    found = await trunk(scripted_engine).embed([[3]], PLAIN)
    assert isinstance(found, ErrorValue)
    assert "the model's engine (ScriptedEngine) makes no embeddings" in found.message
    assert (found.code, found.param) == ("RequestError", "model")


# ---- over a pool, and HTTP -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    with served_pool(save_served_model(tmp_path_factory.mktemp("model"))) as pool:
        yield pool


@pytest.fixture(scope="module")
def plain(served: ServedPool) -> Any:
    return AutoModelForCausalLM.from_pretrained(served.folder).eval()


async def test_texts_that_lack_an_expert_wait_for_it(served: ServedPool, plain: Any) -> None:
    expected = plainly(plain, PROMPTS)
    assert_near(await served.engine.embed(PROMPTS, PLAIN), expected)
    with without_experts(served):
        waiting = asyncio.create_task(served.engine.embed(PROMPTS, PLAIN))
        async with asyncio.timeout(5):
            while not served.engine.stats().parked:
                await asyncio.sleep(0.01)
        assert not waiting.done()
    assert_near(await waiting, expected)
    assert len(served.engine._parked) == 0


async def test_an_expert_that_stays_away_fails_the_call(served: ServedPool) -> None:
    with without_experts(served), pytest.raises(ExpertUnavailable, match="expert"):
        await served.engine.embed(PROMPTS, PLAIN)
    assert await tokens(served.engine, [5, 6], 3)


def test_the_official_client_reads_it(served: ServedPool, plain: Any) -> None:
    ids = [tiny_tokenizer()(text).input_ids for text in ("the quick", "fox")]
    expected = plainly(plain, ids)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    base = f"{str(served.http.base_url).rstrip('/')}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        for form in ("float", "base64", None):
            more: dict[str, Any] = {} if form is None else {"encoding_format": form}
            found = client.embeddings.create(model="m", input=["the quick", "fox"], **more)
            assert [one.index for one in found.data] == [0, 1]
            if form != "base64":  # given as it came
                assert_near(np.array([x.embedding for x in found.data], np.float32), expected)
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
        one = client.embeddings.create(model="m", input=ids[0])
        assert_near(np.array([one.data[0].embedding], np.float32), expected[:1])


async def test_our_clients(served: ServedPool, plain: Any) -> None:
    url = str(served.http.base_url)
    with Client(url) as client:
        found = await asyncio.to_thread(client.embeddings, PROMPTS, model="m", pooling="mean")
        one = await asyncio.to_thread(client.embeddings, "fox", normalize=False)
    assert (len(found.vectors), found.model) == (len(PROMPTS), "m")
    assert found.prompt_tokens == sum(map(len, PROMPTS))
    assert all(math.isclose(math.hypot(*x), 1, abs_tol=1e-5) for x in found.vectors)
    ids = tiny_tokenizer()("fox").input_ids
    assert_near(np.array(one.vectors, np.float32), plainly(plain, [ids]))
    async with AsyncClient(url) as client:
        again = await client.embeddings(PROMPTS, pooling="mean")
    assert (again.model, again.prompt_tokens) == (found.model, found.prompt_tokens)
    assert_near(np.array(again.vectors, np.float32), np.array(found.vectors, np.float32))


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"input": ""}, "input", "none of them empty"),
        ({"input": []}, "input", "none of them empty"),
        ({"input": ["a", ""]}, "input", "none of them empty"),
        ({"input": ["a", [1]]}, "input", "must be a string"),
        ({"input": {"text": "a"}}, "input", "must be a string"),
        ({"input": [1.5]}, "input", "must be a string"),
        ({"input": [True]}, "input", "must be a string"),
        ({"input": ["a"] * 2049}, "input", "has 2049 texts"),
        ({"input": [99_999]}, "input", "token id 99999 is not in the vocabulary"),
        ({"input": [5] * 5000}, "input", "the prompt has 5000 tokens"),
        ({"input": "a" * 200_000}, "input", "characters"),
        ({}, "input", "missing parameter"),
        ({"input": "a", "dimensions": 64}, "dimensions", "dimensions=64 is not supported"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "moesaic": {"pooling": "cls"}}, "moesaic.pooling", "last"),
        ({"input": "a", "moesaic": {"normalize": 1}}, "moesaic.normalize", "boolean"),
        ({"input": "a", "poling": "x"}, "poling", "unknown parameter"),
    ],
)
def test_bad_input(served: ServedPool, wrong: dict[str, Any], param: str, words: str) -> None:
    response = served.http.post("/v1/embeddings", json={"model": "m", **wrong})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_model_that_there_is_not(served: ServedPool) -> None:
    asked = {"model": "x", "input": "a", "user": "somebody"}
    response: httpx.Response = served.http.post("/v1/embeddings", json=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert served.http.post("/v1/embeddings", json=asked | {"model": "m"}).status_code == 200


async def test_a_call_that_is_cancelled_leaves_nothing(served: ServedPool) -> None:
    with without_experts(served):
        waiting = asyncio.create_task(served.engine.embed(PROMPTS, PLAIN))
        while not served.engine.stats().parked:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert len(served.engine._parked) == 0
        assert served.engine._embedding == 0
    async with asyncio.timeout(10):
        async for _ in served.engine.generate("r", [3], Sampling(max_tokens=2)):
            pass
