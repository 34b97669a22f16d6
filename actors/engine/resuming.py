"""Continue a stream in another trunk when its own is lost, for requests that ask for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from ...cluster.routing.expert_fallback import DroppedExperts
from ...proto.errors import Busy, EngineError
from .engine import Delta, Generate, Sampling

logger = logging.getLogger(__name__)

# How long a request is sent again without getting a token; Serve restarts trunks meanwhile.
RESUME_S = 120.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


async def resuming(
    generate: Generate,
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    resume_s: float = RESUME_S,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Delta, None]:
    """Yield what ``generate`` yields; if its trunk is lost, continue in another one.

    The request is sent again with the tokens that were generated, and continues after them.
    Raises EngineError when no trunk gives another token within ``resume_s`` seconds.
    """
    already: list[int] = []
    before: DroppedExperts | None = None  # what the lost trunks dropped
    until: float | None = None
    pause_s = _FIRST_PAUSE_S
    while True:
        dropped = None
        try:
            async with aclosing(generate(request_id, prompt_ids, sampling, already.copy())) as some:
                async for delta in some:
                    if delta.token_ids:
                        already += delta.token_ids
                        until, pause_s = None, _FIRST_PAUSE_S
                    dropped = delta.dropped
                    yield replace(delta, dropped=_both(before, dropped))
            return
        except (EngineError, Busy) as error:
            # A full trunk refuses new requests; once admitted, a request tries another trunk.
            if isinstance(error, Busy) and until is None:
                raise
            now = clock()
            until = until or now + resume_s
            if now + pause_s >= until:
                raise
            logger.warning(
                "request %s continues in another trunk: %s",
                request_id,
                error,
                extra={"request_id": request_id},
            )
        before = _both(before, dropped)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _both(one: DroppedExperts | None, other: DroppedExperts | None) -> DroppedExperts | None:
    if one is None or other is None:
        return one or other
    return DroppedExperts(max(one.largest, other.largest), one.times + other.times)
