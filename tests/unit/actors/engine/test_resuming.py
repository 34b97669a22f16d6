"""Streams that go on in another trunk, over trunks that the test makes up."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from moesaic.actors.engine.engine import Delta, Sampling
from moesaic.actors.engine.resuming import resuming
from moesaic.cluster.routing.expert_fallback import DroppedExperts
from moesaic.proto.errors import Busy, EngineError, ExpertUnavailable, MoesaicError

PROMPT = [1, 2, 3]
ASKED = Sampling(max_tokens=6)


class Trunks:
    """One after the other: each gives so many tokens and is lost with an error; the last ends."""

    def __init__(self, *lives: tuple[int, MoesaicError | None]) -> None:
        self._lives = list(lives)
        self.already: list[list[int]] = []

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        assert (request_id, prompt_ids, sampling) == ("r", PROMPT, ASKED)
        self.already.append(list(already))
        tokens, error = self._lives.pop(0)
        for n in range(tokens):
            dropped = DroppedExperts(0.1 * len(self.already), n + 1)
            yield Delta((10 + len(already) + n,), dropped=dropped)
        if error is not None:
            raise error
        yield Delta((), "length")


async def found(trunks: Trunks, resume_s: float = 60.0) -> list[Delta]:
    stream = resuming(trunks.generate, "r", PROMPT, ASKED, resume_s=resume_s)
    async with aclosing(stream) as deltas:
        return [delta async for delta in deltas]


LOST = EngineError("the trunk was lost")


async def test_it_goes_on_behind_the_tokens_that_it_has() -> None:
    trunks = Trunks((2, LOST), (0, LOST), (3, LOST), (1, None))
    deltas = await found(trunks)
    assert [token for delta in deltas for token in delta.token_ids] == [10, 11, 12, 13, 14, 15]
    assert trunks.already == [[], [10, 11], [10, 11], [10, 11, 12, 13, 14]]
    assert deltas[-1].finish_reason == "length"


async def test_what_was_dropped_adds_up_over_trunks() -> None:
    last = (await found(Trunks((2, LOST), (3, None))))[-2].dropped
    assert last is not None
    assert last.largest == pytest.approx(0.2)
    assert last.times == 5


async def test_a_full_trunk_refuses_new_requests_and_not_those_that_go_on() -> None:
    with pytest.raises(Busy):
        await found(Trunks((0, Busy("full"))))
    deltas = await found(Trunks((1, LOST), (0, Busy("full")), (1, None)))
    assert [token for delta in deltas for token in delta.token_ids] == [10, 11]


async def test_it_gives_up_when_no_trunk_comes() -> None:
    trunks = Trunks((2, LOST), *[(0, LOST)] * 100)
    with pytest.raises(EngineError, match="was lost"):
        await found(trunks, resume_s=0.5)
    # After pauses of 0.05, 0.1, 0.2 seconds.
    assert 3 <= len(trunks.already) <= 5


async def test_what_another_trunk_would_say_too_is_not_asked_again() -> None:
    trunks = Trunks((2, ExpertUnavailable("m: expert 3 of layer 1")), (4, None))
    with pytest.raises(ExpertUnavailable):
        await found(trunks)
    assert len(trunks.already) == 1
