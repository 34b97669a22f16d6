"""A trunk makes one token before it has started, or says why it cannot."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from moesaic.actors.engine.engine import Delta, EngineStats, RequestLimits, Sampling
from moesaic.actors.serve.replica.first_token import make_first_token
from moesaic.actors.serve.replica.trunk import Trunk
from moesaic.proto.errors import EngineError, ExpertUnavailable

DEADLINE_S = 60.0

Answer = Callable[[Sampling], Exception | None]


class Engine:
    """Meets `Engine`; `answer` says for each request which error ends it."""

    limits = RequestLimits(max_prompt_tokens=8, max_total_tokens=9, max_requests=1, vocab_size=1)

    def __init__(self, answer: Answer = lambda sampling: None) -> None:
        self.answer = answer
        self.asked: list[Sampling] = []
        self.life: list[str] = []

    def start(self) -> None:
        self.life.append("started")

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        self.limits.check(prompt_ids, sampling)
        self.asked.append(sampling)
        error = self.answer(sampling)
        if error is not None:
            raise error
        yield Delta((0,), "length")
        self.life.append("token")

    def stats(self) -> EngineStats:
        return EngineStats(healthy=True)

    def close(self) -> None:
        self.life.append("closed")


class Silent(Engine):
    """Makes no token, and ends when it is given up."""

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        try:
            await asyncio.sleep(DEADLINE_S)
            yield Delta((0,), "length")
        finally:
            self.life.append("given up")


def test_it_is_one_token_of_one_request() -> None:
    engine = Engine()
    make_first_token(engine, DEADLINE_S)
    (sampling,) = engine.asked
    assert sampling.max_tokens == 1


async def test_it_is_made_inside_an_event_loop_too() -> None:
    engine = Engine()
    make_first_token(engine, DEADLINE_S)
    assert engine.life == ["token"]


def test_most_experts_missing_are_waited_for_as_requests_do() -> None:
    def answer(sampling: Sampling) -> Exception | None:
        return None if sampling.missing.mode == "wait" else ExpertUnavailable("expert 3")

    engine = Engine(answer)
    make_first_token(engine, DEADLINE_S)
    first, second = engine.asked
    assert (first.missing.mode, second.missing.mode) == ("drop", "wait")
    assert 0 < first.missing.most_dropped < 1  # a token of no expert at all proves nothing


@pytest.mark.parametrize("error", [ExpertUnavailable("expert 3 is gone"), EngineError("it failed")])
def test_what_keeps_it_from_a_token_is_raised(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        make_first_token(Engine(lambda sampling: error), DEADLINE_S)


def test_it_has_a_deadline() -> None:
    engine = Silent()
    with pytest.raises(EngineError, match=r"made no token for 0\.05 s"):
        make_first_token(engine, 0.05)
    assert engine.life == ["given up"]


def test_a_replica_starts_with_it_and_frees_the_engine_without_it() -> None:
    trunk: Any = Trunk.func_or_class
    engine = Engine()
    made = trunk(lambda: engine)
    assert engine.life == ["started", "token"]
    del made
    failing = Engine(lambda sampling: EngineError("no"))
    with pytest.raises(EngineError):
        trunk(lambda: failing)
    gc.collect()  # of the error's traceback
    assert failing.life == ["started", "closed"]
