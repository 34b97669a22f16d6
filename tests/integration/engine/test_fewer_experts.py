"""`experts_per_token`: a request may have fewer experts than the model's gates choose."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moesaic.actors.engine.engine import ExpertBounds, Sampling
from moesaic.actors.preflight.findings import raise_errors
from moesaic.actors.preflight.preflight import bounds_of, preflight
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import ClusterError, RequestError
from tests.helpers.pool.served_pool import ServedPool, save_served_model, served_pool

TOKENS = 8
PROMPTS = [[5, 7, 11, 13], [3], list(range(20, 60)), [9, 8, 7, 6, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[ServedPool]:
    with served_pool(folder, experts=ExpertBounds(maximum=2, minimum=1)) as pool:
        yield pool


def alone(folder: Path, experts_per_token: int) -> list[list[int]]:
    """Greedy answers of the model itself, whose configuration has so many."""
    config = AutoConfig.from_pretrained(folder, num_experts_per_tok=experts_per_token)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
        .tolist()
        for ids in PROMPTS
    ]  # fmt: skip


async def answer(served: ServedPool, name: str, ids: list[int], experts: int | None) -> list[int]:
    found: list[int] = []
    asked = Sampling(max_tokens=TOKENS, experts_per_token=experts)
    async for delta in served.engine.generate(name, ids, asked):
        found += delta.token_ids
    return found


async def test_each_request_of_a_batch_has_its_own_number(served: ServedPool) -> None:
    """Mixtral's weights add up to one, so fewer experts are what a smaller configuration gives."""
    expected = {number: alone(served.folder, number) for number in (1, 2)}
    assert expected[1] != expected[2]
    asked = [(n, ids, few) for n, ids in enumerate(PROMPTS) for few in (1, 2, None)]
    answers = await asyncio.gather(
        *(answer(served, f"{n}-{few}", ids, few) for n, ids, few in asked)
    )
    for (n, _, few), tokens in zip(asked, answers, strict=True):
        assert tokens == expected[few or 2][n]


def ask(served: ServedPool, expert_options: dict[str, Any] | None, **more: Any) -> httpx.Response:
    body = {"model": "m", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, **more}
    if expert_options is not None:
        body["moesaic"] = expert_options
    return served.http.post("/v1/completions", json=body)


def test_the_response_says_what_was_used(served: ServedPool) -> None:
    text = AutoTokenizer.from_pretrained(served.folder).decode(alone(served.folder, 1)[0])
    (choice,) = ask(served, {"experts_per_token": 1}).json()["choices"]
    assert choice["moesaic"] == {"experts_per_token": 1}
    assert choice["text"] == text
    assert "moesaic" not in ask(served, None).json()["choices"][0]
    streamed = ask(served, {"experts_per_token": 1}, stream=True).text
    assert streamed.count('"experts_per_token":1') == 1


def test_what_had_fewer_experts_is_no_later_answers_prefix(served: ServedPool) -> None:
    prompt = [*range(60, 124)]
    assert ask(served, {"experts_per_token": 1}, prompt=prompt).status_code == 200
    after = ask(served, None, prompt=prompt).json()["choices"][0]["text"]
    with served_pool(served.folder) as untouched:
        assert after == untouched.text(prompt, TOKENS)


@pytest.mark.parametrize("number", [3, 99])
def test_more_than_the_model_has_is_refused(served: ServedPool, number: int) -> None:
    response = ask(served, {"experts_per_token": number})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "moesaic.experts_per_token"
    assert f"is {number}; allowed here: 1 to 2" in error["message"]


@pytest.mark.parametrize(
    ("bounds", "asked", "granted"),
    [
        (ExpertBounds(), None, None),
        (ExpertBounds(maximum=8), None, None),
        (ExpertBounds(maximum=8), 8, 8),
        (ExpertBounds(maximum=8), 7, "allowed here: 8 to 8"),
        (ExpertBounds(), 1, "allowed here: none"),
        (ExpertBounds(maximum=8, minimum=4), 4, 4),
        (ExpertBounds(maximum=8, minimum=4), 3, "allowed here: 4 to 8"),
        (ExpertBounds(maximum=8, default=6), None, 6),
        (ExpertBounds(maximum=8, default=6), 8, 8),
        (ExpertBounds(maximum=8, default=6), 5, "allowed here: 6 to 8"),
        (ExpertBounds(maximum=8, default=6, minimum=2), 2, 2),
        (ExpertBounds(minimum=2), 5, 5),
    ],
)
def test_what_is_granted(bounds: ExpertBounds, asked: int | None, granted: int | str) -> None:
    if isinstance(granted, str):
        with pytest.raises(RequestError, match=granted):
            bounds.granted(asked)
    else:
        assert bounds.granted(asked) == granted


def test_a_spec_of_more_than_the_model_has_is_refused(folder: Path) -> None:
    model = {"name": "m", "path": str(folder), "min_experts_per_token": 1, "experts_per_token": 2}
    spec = parse_spec({"models": [model], "endpoint": {"port": 0}})
    described = preflight(spec).described["m"]
    assert bounds_of(spec.models[0], described) == ExpertBounds(maximum=2, default=2, minimum=1)
    more = parse_spec({"models": [model | {"experts_per_token": 3}], "endpoint": {"port": 0}})
    with pytest.raises(ClusterError, match=r"experts_per_token: 3, but 'm' has 2 experts"):
        raise_errors(preflight(more).findings)


def test_the_default_is_the_specs(folder: Path) -> None:
    with served_pool(folder, experts=replace(ExpertBounds(maximum=2), default=1)) as pool:
        (choice,) = ask(pool, None).json()["choices"]
    assert choice["moesaic"] == {"experts_per_token": 1}
