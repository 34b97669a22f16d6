"""A request says what is to happen when an expert is not to be had: wait, fail, or do without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from moesaic.actors.host.host import ExpertHost
from moesaic.cluster.expert_keys import ExpertKey, LayerKey, first_versions
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId
from tests.helpers.pool.served_pool import DEADLINE_S, ServedPool, save_served_model, served_pool

PROMPT = [*range(5, 37)]
TOKENS = 6


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    with served_pool(save_served_model(tmp_path_factory.mktemp("model"))) as pool:
        yield pool


@contextmanager
def without_experts(served: ServedPool, only: int | None = None) -> Iterator[list[ExpertKey]]:
    """One host has forgotten its experts, or the one with a number; at the end it holds them
    again. The router is told, as by a controller."""
    host: ExpertHost = served.hosts[0]
    report = host.report()
    keys = [layer.expert(e) for layer, experts in report.holdings.items() for e in experts]
    keys = sorted(keys) if only is None else sorted(keys)[only : only + 1]
    before = served.pool.router._dispatcher.placement or served.pool.placement
    host.release(first_versions(keys))
    _place(served, {layer: _without(layer, one, keys) for layer, one in before.layers.items()})
    try:
        yield keys
    finally:
        host.load(report.models, first_versions(keys))
        _place(served, before.layers)


def _without(layer: LayerKey, placed: LayerPlacement, keys: list[ExpertKey]) -> LayerPlacement:
    replicas = [() if layer.expert(e) in keys else one for e, one in enumerate(placed.replicas)]
    return LayerPlacement(tuple(replicas))


def _place(served: ServedPool, layers: Mapping[LayerKey, LayerPlacement]) -> None:
    current = served.pool.router._dispatcher.placement or served.pool.placement
    number = PlacementId(1, current.id.epoch + 1)
    served.pool.router.place(Placement(number, current.hosts, layers))


def ask(served: ServedPool, expert_options: dict[str, Any] | None, **more: Any) -> httpx.Response:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **more}
    if expert_options is not None:
        body["moesaic"] = expert_options
    return served.http.post("/v1/completions", json=body)


def test_drop_goes_on_and_says_how_much_was_left_out(served: ServedPool) -> None:
    with without_experts(served):
        response = ask(served, {"missing_expert": "drop"})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert 0 < choice["moesaic"]["max_dropped"] <= 1
    assert choice["moesaic"]["times_dropped"] >= TOKENS


def test_nothing_is_said_where_nothing_was_left_out(served: ServedPool) -> None:
    response = ask(served, {"missing_expert": "drop"})
    assert "moesaic" not in response.json()["choices"][0]


def test_what_was_computed_without_experts_is_no_later_answers_prefix(served: ServedPool) -> None:
    prompt = [*range(40, 104)]
    before = ask(served, None, prompt=prompt).json()["choices"][0]["text"]
    other = [*range(41, 105)]
    with without_experts(served):
        worse = ask(served, {"missing_expert": "drop"}, prompt=other)
        assert worse.json()["choices"][0]["moesaic"]["times_dropped"] > 0
    fresh = ask(served, None, prompt=other).json()["choices"][0]["text"]
    assert ask(served, None, prompt=prompt).json()["choices"][0]["text"] == before
    assert fresh == served.text(other, TOKENS)
    assert fresh == _alone(served, other)


def _alone(served: ServedPool, prompt: list[int]) -> str:
    """The answer of a pool that never lacked an expert."""
    with served_pool(served.folder) as untouched:
        return untouched.text(prompt, TOKENS)


def test_a_cap_on_what_may_be_left_out(served: ServedPool) -> None:
    with without_experts(served):
        response = ask(served, {"missing_expert": "drop", "max_dropped": 1e-6})
    assert response.status_code == 503
    error = response.json()["error"]
    assert error["code"] == "ExpertUnavailable"
    assert "expert" in error["message"]


def test_fail_does_not_wait_and_wait_does(served: ServedPool) -> None:
    """`wait` is answered once the experts are back, long behind the others."""
    with ThreadPoolExecutor(1) as threads:
        with without_experts(served):
            assert ask(served, {"missing_expert": "fail"}).status_code == 503
            assert ask(served, {"missing_expert": "wait", "wait_s": 0.2}).status_code == 503
            waiting = threads.submit(ask, served, None)
        answered = waiting.result(DEADLINE_S)
    assert answered.status_code == 200
    assert answered.json()["choices"][0]["text"] == served.text(PROMPT, TOKENS)


def test_the_last_chunk_of_a_stream_says_it(served: ServedPool) -> None:
    with (
        without_experts(served),
        openai.OpenAI(
            base_url=f"{served.http.base_url}/v1", api_key="none", max_retries=0
        ) as client,
    ):
        chunks = list(
            client.completions.create(
                model="m",
                prompt=PROMPT,
                max_tokens=TOKENS,
                stream=True,
                extra_body={"moesaic": {"missing_expert": "drop"}},
            )
        )
    said = [getattr(chunk.choices[0], "moesaic", None) for chunk in chunks]
    assert said[:-1] == [None] * (len(chunks) - 1)
    assert said[-1] is not None
    assert said[-1]["max_dropped"] > 0


@pytest.mark.parametrize(
    ("expert_options", "param"),
    [
        ({"missing_expert": "hope"}, "moesaic.missing_expert"),
        ({"wait_s": -1}, "moesaic.wait_s"),
        ({"max_dropped": 0.5}, "moesaic.max_dropped"),
        ({"missing_expert": "drop", "max_dropped": 2}, "moesaic.max_dropped"),
        ({"missing": "drop"}, "moesaic.missing"),
        ("drop", "moesaic"),
    ],
)
def test_options_that_make_no_sense_is_refused_by_name(
    served: ServedPool, expert_options: Any, param: str
) -> None:
    response = ask(served, expert_options)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
