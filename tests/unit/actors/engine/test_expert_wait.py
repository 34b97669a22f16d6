"""Requests that wait for an expert outside of the batch, over attempts that the test makes up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

import pytest
import torch

from moesaic.actors.engine.engine import Delta, Sampling
from moesaic.actors.engine.expert_wait import ParkedRequests
from moesaic.actors.engine.sampling import RequestSampler
from moesaic.actors.engine.vllm_backend.requests import going_on
from moesaic.actors.text.answer_form import AnswerForm
from moesaic.cluster.routing.expert_options import MissingExpert
from moesaic.proto.errors import EngineError, ExpertUnavailable, Interrupted
from tests.helpers.cluster.fake_clock import FakeClock

PROMPT = [1, 2, 3]
ASKED = Sampling(max_tokens=6)


class Batch:
    """Each attempt gives so many tokens and then lacks an expert, the last one ends."""

    def __init__(self, *tokens: int, is_back: Callable[[], bool] | None = lambda: True) -> None:
        self._tokens = list(tokens)
        self._is_back = is_back
        self.asked: list[tuple[list[int], int]] = []

    async def attempt(self, tokens: list[int], left: int) -> AsyncGenerator[Delta, None]:
        self.asked.append((list(tokens), left))
        for _ in range(self._tokens.pop(0) if self._tokens else 0):
            tokens.append(len(tokens) + 1)
            yield Delta((tokens[-1],))
        if self._tokens:
            error = ExpertUnavailable("m: expert 3 of layer 1: no replica")
            error.is_back = self._is_back
            raise error
        yield Delta((), "length")


async def texts(parking: ParkedRequests, batch: Batch, asked: Sampling = ASKED) -> list[int]:
    found: list[int] = []
    async with aclosing(parking.generate(batch.attempt, PROMPT, asked)) as deltas:
        async for delta in deltas:
            found += delta.token_ids
    return found


def lot(
    wait_s: float = 5.0,
    check: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> ParkedRequests:
    return ParkedRequests(wait_s, check, clock)


async def test_it_goes_on_where_it_was() -> None:
    batch = Batch(2, 0, 1, 3)
    assert await texts(lot(), batch) == [4, 5, 6, 7, 8, 9]
    assert batch.asked == [
        ([1, 2, 3], 6),
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5, 6], 3),
    ]


async def test_it_is_counted_while_it_waits_and_comes_back_when_the_expert_does() -> None:
    there = False
    batch, parking = Batch(1, 5, is_back=lambda: there), lot()
    waiting = asyncio.create_task(texts(parking, batch))
    while not parking:
        await asyncio.sleep(0)
    assert len(parking) == 1
    assert len(batch.asked) == 1
    there = True
    assert await waiting == [4, 5, 6, 7, 8, 9]
    assert len(parking) == 0


async def test_it_waits_no_longer_than_it_may() -> None:
    clock = FakeClock(step_s=1.0)
    batch, parking = Batch(2, 1, is_back=lambda: False), lot(30.0, clock=clock)
    with pytest.raises(ExpertUnavailable, match="expert 3"):
        await texts(parking, batch)
    assert clock.now == pytest.approx(130.0, abs=3.0)
    assert len(parking) == 0
    assert len(batch.asked) == 1


async def test_an_expert_that_only_seems_to_be_back_does_not_hold_the_request_for_ever() -> None:
    batch = Batch(*[0] * 100)
    with pytest.raises(ExpertUnavailable):
        await texts(lot(1.0), batch)
    # Away for 0, 0.1, 0.2, 0.4 seconds.
    assert 3 <= len(batch.asked) <= 5


async def test_a_token_in_between_begins_the_wait_anew() -> None:
    batch = Batch(*[1] * 6)
    assert await texts(lot(0.2), batch) == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("asked", [MissingExpert(mode="fail"), MissingExpert(mode="drop")])
async def test_who_does_not_wait_is_not_parked(asked: MissingExpert) -> None:
    batch = Batch(1, 1)
    with pytest.raises(ExpertUnavailable):
        await texts(lot(), batch, Sampling(max_tokens=6, missing=asked))
    assert len(batch.asked) == 1


async def test_the_router_looks_for_the_expert_exactly_while_a_request_is_parked() -> None:
    steps: list[str] = []

    @contextmanager
    def expecting() -> Iterator[None]:
        steps.append("begins")
        yield
        steps.append("ends")

    def is_back() -> bool:
        steps.append("looks")
        return True

    async def attempt(tokens: list[int], left: int) -> AsyncGenerator[Delta, None]:
        steps.append("tries")
        if steps.count("tries") == 1:
            error = ExpertUnavailable("m: expert 3 of layer 1: no replica")
            error.is_back, error.expecting = is_back, expecting
            raise error
        yield Delta((4,), "length")

    async with aclosing(lot().generate(attempt, PROMPT, ASKED)) as deltas:
        assert [delta.token_ids async for delta in deltas] == [(4,)]
    assert steps == ["tries", "begins", "looks", "ends", "tries"]


async def test_its_own_time_to_wait_counts() -> None:
    clock = FakeClock(step_s=1.0)
    batch = Batch(1, 1, is_back=lambda: False)
    asked = Sampling(max_tokens=6, missing=MissingExpert(wait_s=15.0))
    with pytest.raises(ExpertUnavailable):
        await texts(lot(600.0, clock=clock), batch, asked)
    assert clock.now == pytest.approx(115.0, abs=3.0)


async def test_where_nobody_can_tell_whether_it_is_back_nobody_waits() -> None:
    batch = Batch(1, 1, is_back=None)
    with pytest.raises(ExpertUnavailable):
        await texts(lot(), batch)


async def test_an_engine_that_ends_takes_the_parked_with_it() -> None:
    def ended() -> None:
        raise EngineError("the engine has ended")

    batch, parking = Batch(1, 1, is_back=lambda: False), lot(check=ended)
    with pytest.raises(EngineError):
        await texts(parking, batch)
    assert len(parking) == 0


async def test_who_goes_away_while_parked_is_forgotten() -> None:
    parking = lot()
    waiting = asyncio.create_task(texts(parking, Batch(1, 1, is_back=lambda: False)))
    while not parking:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(parking) == 0


def test_what_goes_on_in_vllm() -> None:
    asked = Sampling(max_tokens=6, temperature=1.0, seed=5)
    assert going_on(asked, []) == asked
    later = going_on(asked, [7, 8])
    assert later.max_tokens == 4
    assert later.seed not in (None, 5)
    assert going_on(replace(asked, seed=None), [7, 8]).seed is None
    shaped = replace(asked, form=AnswerForm(json_schema="{}"))
    assert going_on(shaped, []) == shaped
    with pytest.raises(Interrupted) as caught:
        going_on(shaped, [7, 8])
    assert caught.value.retryable


def test_in_vllm_a_bias_stands_for_the_frequencies_of_what_was_generated() -> None:
    """vLLM counts the tokens after the resumption itself, and takes those before for the prompt."""
    asked = Sampling(max_tokens=9, frequency_penalty=0.5, logit_bias=((7, 1.0), (9, -2.0)))
    before, after = [7, 8, 7], [8, 8, 3]
    logits = torch.linspace(-1, 1, 12)
    whole = RequestSampler(asked, PROMPT, [*before, *after]).adjust(logits)
    resumed = going_on(asked, before)
    assert resumed.max_tokens == 6
    found = RequestSampler(resumed, [*PROMPT, *before], after).adjust(logits)
    torch.testing.assert_close(found, whole)


def test_in_vllm_the_penalty_of_repetition_goes_on_by_itself() -> None:
    asked = Sampling(max_tokens=9, repetition_penalty=1.5)
    before, after = [7, 8, 7], [8, 8, 3]
    logits = torch.linspace(-1, 1, 12)
    whole = RequestSampler(asked, PROMPT, [*before, *after]).adjust(logits)
    found = RequestSampler(going_on(asked, before), [*PROMPT, *before], after).adjust(logits)
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(max_tokens=9, presence_penalty=0.5),
        Sampling(max_tokens=9, frequency_penalty=0.5, repetition_penalty=1.5),
    ],
)
def test_in_vllm_penalties_that_would_be_forgotten_end_the_answer(asked: Sampling) -> None:
    assert going_on(asked, []) == asked
    with pytest.raises(Interrupted, match="penalty"):
        going_on(asked, [7])
