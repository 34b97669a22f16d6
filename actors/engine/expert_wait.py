"""Requests that wait outside the batch for an expert that no host has at the moment.

A batch is computed together, so a request that waited inside it would hold up the others. A row
whose expert is missing ends its request's attempt with ExpertUnavailable; the engine (`RowOwner`)
knows which request a row belongs to. The request starts again, with the tokens that it has, once
the expert is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ...cluster.routing.expert_options import SHORT_WAIT_S
from ...cluster.tracing.stages import RequestTrace
from ...proto.errors import ExpertUnavailable
from .engine import Delta, Sampling

# One attempt's generator, from (prompt and tokens generated so far, how many more tokens).
Attempt = Callable[[list[int], int], AsyncGenerator[Delta, None]]

# Interval at which a request checks whether its expert is back. With many parked requests it grows,
# so that all together make about _LOOKS_AT_ONCE checks in that time.
_LOOK_S = 0.02
_LOOKS_AT_ONCE = 8
# Each attempt holds up the batch for a moment. So a request whose expert seems to be back, but is
# missing again, stays away twice as long each time, at most this long.
_LONGEST_AWAY_S = 2.0


class ParkedRequests:
    """The parked requests of one engine."""

    def __init__(
        self,
        wait_s: float,
        check: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the parking of an engine.

        A request waits at most ``wait_s``, or less if it asks for less. ``check()`` raises
        when the engine has ended.
        """
        self._wait_s = wait_s
        self._check = check
        self._clock = clock
        self._parked = 0

    def __len__(self) -> int:
        return self._parked

    async def generate(
        self,
        attempt: Attempt,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
        trace: RequestTrace | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yield the tokens of all attempts as one stream; ``trace`` gets to know of waits.

        Raises ExpertUnavailable when a request waits too long, for one expert or several,
        without a token in between.
        """
        tokens = [*prompt_ids, *already]
        stay = _Stay(self._patience_s(sampling), self._clock)
        while True:
            left = sampling.max_tokens - (len(tokens) - len(prompt_ids))
            if left <= 0:  # the last attempt gave all its tokens
                yield Delta((), "length")
                return
            try:
                async with aclosing(attempt(tokens.copy(), left)) as deltas:
                    async for delta in deltas:
                        tokens += delta.token_ids
                        if delta.token_ids:
                            stay = _Stay(self._patience_s(sampling), self._clock)
                        yield delta
                return
            except ExpertUnavailable as error:
                if sampling.missing.mode != "wait" or error.is_back is None:
                    raise
                if trace is not None:
                    trace.parked()
                await self._park(stay, error, error.is_back)
                if trace is not None:
                    trace.unparked()

    def _patience_s(self, sampling: Sampling) -> float:
        asked = sampling.missing.wait_s
        return self._wait_s if asked is None else min(asked, self._wait_s)

    async def _park(
        self, stay: _Stay, error: ExpertUnavailable, is_back: Callable[[], bool]
    ) -> None:
        self._parked += 1
        try:
            least = self._clock() + stay.begin()
            with error.expecting():
                while self._clock() < least or not is_back():
                    self._check()
                    if self._clock() >= stay.until:
                        raise error
                    await asyncio.sleep(_LOOK_S * max(1.0, self._parked / _LOOKS_AT_ONCE))
        finally:
            self._parked -= 1


class _Stay:
    """How long a request has been parked since its last token."""

    def __init__(self, patience_s: float, clock: Callable[[], float]) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._away_s = 0.0
        self.until = float("inf")

    def begin(self) -> float:
        """Return the seconds to stay away at least.

        0 the first time, then twice as long each time, up to _LONGEST_AWAY_S.
        """
        if self.until == float("inf"):
            # The row has already waited SHORT_WAIT_S inside the batch.
            self.until = self._clock() + self._patience_s - SHORT_WAIT_S
            return 0.0
        self._away_s = min(max(2 * self._away_s, SHORT_WAIT_S), _LONGEST_AWAY_S)
        return self._away_s
