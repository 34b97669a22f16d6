"""Requests that wait, outside of the batch, for an expert that nobody has at the moment.

A batch is computed together, so whoever waits inside it holds the others up. The map from rows to
requests is the engine's (`RowOwner`): a row whose expert is not to be had ends its request's
attempt with ExpertUnavailable, and the request begins anew, with the tokens that it has, once the
expert is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ...cluster.routing.expert_options import SHORT_WAIT_S
from ...proto.errors import ExpertUnavailable
from .engine import Delta, Sampling

# The tokens of one attempt: (prompt and what was generated so far, how many more).
Attempt = Callable[[list[int], int], AsyncGenerator[Delta, None]]

# Of one request, between looks whether the expert is back; of many together about as often.
_LOOK_S = 0.02
_LOOKS_AT_ONCE = 8
# An expert that seems to be there and is not: its request stays away for twice as long each time,
# since each attempt holds the others up for a moment.
_LONGEST_AWAY_S = 2.0


class Parking:
    """The parked requests of one engine."""

    def __init__(self, wait_s: float, check: Callable[[], object]) -> None:
        """A request waits ``wait_s`` at most, or what it asks for; ``check()`` raises when the
        engine has ended."""
        self._wait_s = wait_s
        self._check = check
        self._parked = 0

    def __len__(self) -> int:
        return self._parked

    async def generate(
        self,
        attempt: Attempt,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        """What the attempts yield, as if there were one. Raises ExpertUnavailable when the wait
        for one expert after the other, without a token in between, takes too long."""
        tokens = [*prompt_ids, *already]
        stay = _Stay(self._patience_s(sampling))
        while True:
            left = sampling.max_tokens - (len(tokens) - len(prompt_ids))
            if left <= 0:  # its last token was given before
                yield Delta((), "length")
                return
            try:
                async with aclosing(attempt(tokens.copy(), left)) as deltas:
                    async for delta in deltas:
                        tokens += delta.token_ids
                        if delta.token_ids:
                            stay = _Stay(self._patience_s(sampling))
                        yield delta
                return
            except ExpertUnavailable as error:
                if sampling.missing.mode != "wait" or error.is_back is None:
                    raise
                await self._park(stay, error, error.is_back)

    def _patience_s(self, sampling: Sampling) -> float:
        asked = sampling.missing.wait_s
        return self._wait_s if asked is None else min(asked, self._wait_s)

    async def _park(
        self, stay: _Stay, error: ExpertUnavailable, is_back: Callable[[], bool]
    ) -> None:
        self._parked += 1
        try:
            least = time.monotonic() + stay.begin()
            while time.monotonic() < least or not is_back():
                self._check()
                if time.monotonic() >= stay.until:
                    raise error
                await asyncio.sleep(_LOOK_S * max(1.0, self._parked / _LOOKS_AT_ONCE))
        finally:
            self._parked -= 1


class _Stay:
    """How long a request that gets no token has been parked."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._away_s = 0.0
        self.until = float("inf")

    def begin(self) -> float:
        """Seconds to stay away at least: nothing the first time."""
        if self.until == float("inf"):
            # The batch has waited before.
            self.until = time.monotonic() + self._patience_s - SHORT_WAIT_S
            return 0.0
        self._away_s = min(max(2 * self._away_s, SHORT_WAIT_S), _LONGEST_AWAY_S)
        return self._away_s
