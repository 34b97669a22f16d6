"""A trunk's first token, which it makes before it counts as started.

It is the proof that requests will be answered: the weights are read, the router reaches its hosts,
and a forward pass goes through the experts of all layers. Serve sends a replica no request while
its constructor runs, so requests go to other replicas meanwhile.

The trunk makes it right after the engine's start, which waits until the model's experts are
placed. So the token wakes no model that sleeps; it costs one step, and no user's request waits for
more. It is no request of the endpoint and counts in none of its metrics. Routers count it as the
load that it is: a model may sleep ``idle_s`` after its trunk has started, as after any call.

A trunk is to answer for itself, not for the pool. So a few experts that are missing, which requests
wait for in any trunk, do not keep a new one from starting: its token is made without them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from ....cluster.routing.expert_options import MissingExpert
from ....proto.errors import EngineError, ExpertUnavailable
from ...engine.engine import Engine, Sampling

log = logging.getLogger(__name__)

# Every model has a token of this number.
_PROMPT = (0,)
_WITHOUT_A_FEW = Sampling(
    max_tokens=1, missing=MissingExpert(mode="drop", wait_s=1.0, most_dropped=0.5)
)
_WAITING = Sampling(max_tokens=1)


def make_first_token(engine: Engine, timeout_s: float) -> None:
    """Let a started engine generate one token.

    If more than half of the token's experts are missing, it waits for them as requests do. Raises
    what keeps requests from being answered: EngineError also after ``timeout_s``,
    ExpertUnavailable, or another MoesaicError.
    """

    async def generate(sampling: Sampling) -> None:
        generated = engine.generate("first token", _PROMPT, sampling)
        async with aclosing(generated) as deltas:
            async for _ in deltas:
                pass

    async def make() -> None:
        try:
            await generate(_WITHOUT_A_FEW)
        except ExpertUnavailable:
            await generate(_WAITING)

    began = time.monotonic()
    # In a thread, since the constructor of a replica runs inside an event loop.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(asyncio.run, asyncio.wait_for(make(), timeout_s)).result()
        except TimeoutError:
            raise EngineError(
                f"the trunk has made no token for {timeout_s:g} s after its start; see "
                "`moesaic status` for its hosts"
            ) from None
    log.info("the trunk has made its first token in %.2f s", time.monotonic() - began)
