"""Experts that are not finite, or go away: only the requests that used them end, by name."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cluster.expert_keys import ExpertVersion, LayerKey
from moesaic.cluster.routing.transports import Transport
from moesaic.proto.errors import ExpertUnavailable
from tests.helpers.pool.host_calls import HIDDEN, KEY, LAYER, PROMPT, ask
from tests.helpers.pool.served_pool import ServedPool, held
from tests.helpers.pool.transports import settles

# ---- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_hidden_states_that_are_not_finite_accuse_no_expert(
    served: ServedPool, transport: Transport
) -> None:
    x_TH = torch.ones(2, HIDDEN)
    x_TH[0, 3] = torch.nan
    reply, y_TH = ask(served, transport, x_TH=x_TH)
    assert not reply.bad_experts
    assert y_TH.isfinite().all(dim=1).tolist() == [False, True]


def used_experts(served: ServedPool, prompt: list[int]) -> set[int]:
    """The experts of the layer that a request uses, from its prompt to its last token."""
    used: set[int] = set()
    real = served.pool.router.forward

    def forward(key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if key == KEY:
            used.update(ids_TK.reshape(-1).tolist())
        return real(key, x_TH, ids_TK, weights_TK)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.pool.router, "forward", forward)
        served.text(prompt)
    return used


def one_that_differs(served: ServedPool) -> tuple[int, list[int], list[list[int]]]:
    """(expert, a prompt that uses it, prompts that do not)."""
    used = {token: used_experts(served, [token]) for token in range(10, 34)}
    for expert in range(8):
        users = [token for token, experts in used.items() if expert in experts]
        others = [token for token, experts in used.items() if expert not in experts]
        if users and len(others) >= 2:
            return expert, [users[0]], [[token] for token in others[:2]]
    raise AssertionError("every request uses every expert")


def together(served: ServedPool, prompts: list[list[int]]) -> list[Any]:
    """The answers to requests that the engine runs in one batch."""
    with ThreadPoolExecutor(8) as threads:
        with held(served.hosts[0]):
            # The others come while this one is in the model.
            first = threads.submit(served.complete, PROMPT, 1)
            assert settles(lambda: served.engine.stats().running == 1)
            answers = [threads.submit(served.complete, prompt) for prompt in prompts]
            assert settles(lambda: served.engine.stats().waiting == len(prompts))
        assert first.result(30).status_code == 200
        return [answer.result(30) for answer in answers]


def test_an_expert_that_is_not_finite_hurts_only_the_requests_that_used_it(
    served: ServedPool,
) -> None:
    expert, user, others = one_that_differs(served)
    key = KEY.expert(expert)
    expected = [served.text(prompt) for prompt in others]
    store = served.holder(key)._store
    sound = store.get(ExpertVersion(key, 1))
    store.put(ExpertVersion(key, 1), sound | {"down": torch.full_like(sound["down"], torch.nan)})
    try:
        failed, *fine = together(served, [user, *others])
    finally:
        store.put(ExpertVersion(key, 1), sound)
    assert failed.status_code == 500
    error = failed.json()["error"]
    assert error["code"] == "BadExpert"
    named = f"expert {expert} of layer {LAYER} of m"
    assert error["message"] == f"{named}: the output has NaN or infinite values"
    assert [answer.json()["choices"][0]["text"] for answer in fine] == expected
    assert served.complete(user).status_code == 200


def test_a_streamed_answer_ends_with_the_error(served: ServedPool) -> None:
    expert, user, _ = one_that_differs(served)
    key = KEY.expert(expert)
    store = served.holder(key)._store
    sound = store.get(ExpertVersion(key, 1))
    asked = {"model": "m", "prompt": user, "max_tokens": 6, "temperature": 0, "stream": True}
    store.put(ExpertVersion(key, 1), sound | {"down": torch.full_like(sound["down"], torch.inf)})
    try:
        answer = served.http.post("/v1/completions", json=asked)
    finally:
        store.put(ExpertVersion(key, 1), sound)
    assert f"expert {expert} of layer {LAYER} of m" in answer.text
    assert "[DONE]" not in answer.text


# ---- experts that go away -----------------------------------------------------------------------


def test_an_expert_that_is_evicted_in_flight_ends_its_requests_by_name(
    served: ServedPool,
) -> None:
    expert, user, others = one_that_differs(served)
    key = KEY.expert(expert)
    host = served.holder(key)
    expected = [served.text(prompt) for prompt in others]
    evicting = threading.Thread(target=host.release, args=([ExpertVersion(key, 1)],))
    with ThreadPoolExecutor(1) as threads, held(host) as go_on:
        first = threads.submit(served.complete, PROMPT, 1)
        assert settles(lambda: served.engine.stats().running == 1)
        evicting.start()
        assert settles(lambda: len(host._loop._posted) == 1)
        go_on()
        first.result(30)
    evicting.join(30)
    try:
        failed, *fine = together(served, [user, *others])
    finally:
        ref, shape = host.report().models[0]
        host.load([(ref, shape)], [ExpertVersion(key, 1)])
    assert failed.status_code == 503
    error = failed.json()["error"]
    assert error["code"] == ExpertUnavailable.__name__
    assert f"expert {expert} of layer {LAYER} of m: no replica answered" in error["message"]
    assert [answer.json()["choices"][0]["text"] for answer in fine] == expected
    assert served.complete(user).status_code == 200
