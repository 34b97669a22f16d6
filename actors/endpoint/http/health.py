"""Answer probes: whether this process lives, has started, and whether its models make progress.

The ingress sees its own requests and their tokens. That is enough, unless a long prompt takes many
steps before its first token, work was lost, or the model is idle. Only then a task asks the trunk,
with a deadline; probes never wait for it and are answered at once from what is known. An idle trunk
is asked because of a probe, and never if it may have been scaled away: it would start again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from ....cluster.service.progress import ModelProgress, TrunkHeartbeat
from ....proto.errors import EngineError, UnknownModel
from ...engine.engine import Delta, Generate, Pooling, Sampling

if TYPE_CHECKING:
    import numpy as np

    from ...engine.served_model import Embed

logger = logging.getLogger(__name__)

LOOK_S = 1.0
HEAR_S = 2.0


class HeartbeatSource(Protocol):
    """Asks one of a model's trunks how it is; they may be frozen or gone."""

    async def __call__(self) -> TrunkHeartbeat | None:
        """Return what one trunk reports, or None while the model sleeps and has no trunk.

        Raises MoesaicError where no trunk answers.
        """
        ...


class ModelHealth:
    """The health of one model, as its requests and their tokens show it."""

    def __init__(
        self,
        progress: ModelProgress | None = None,
        hear: HeartbeatSource | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the health of a model; without ``hear`` only tokens count as progress."""
        self._progress = progress or ModelProgress()
        self._hear = hear
        self._clock = clock
        self._looking: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """How many requests are not over."""
        return self._progress.pending

    @property
    def is_ready(self) -> bool:
        return self._progress.is_ready(self._clock())

    def probed(self) -> None:
        """Check an idle trunk in the background; the next probe reports the result."""
        if self._hear is not None:
            self._progress.probed(self._clock())
            self._keep_looking()

    def watch(self, generate: Generate) -> Generate:
        """Return ``generate``, wrapped so that requests and tokens are noted."""

        async def watched(
            request_id: str,
            prompt_ids: Sequence[int],
            sampling: Sampling,
            already: Sequence[int] = (),
        ) -> AsyncGenerator[Delta, None]:
            progress, clock = self._progress, self._clock
            self._began()
            lost = False
            try:
                async with aclosing(generate(request_id, prompt_ids, sampling, already)) as deltas:
                    async for delta in deltas:
                        progress.moved(clock())
                        yield delta
            except EngineError:
                lost = True
                raise
            finally:
                progress.ended(clock(), lost=lost)

        return watched

    def watch_embed(self, embed: Embed) -> Embed:
        """Return ``embed``, wrapped so that requests and answers are noted."""

        async def watched(
            prompts: Sequence[Sequence[int]], pooling: Pooling, request_id: str
        ) -> np.ndarray:
            self._began()
            lost = False
            try:
                found = await embed(prompts, pooling, request_id)
                self._progress.moved(self._clock())
                return found
            except EngineError:
                lost = True
                raise
            finally:
                self._progress.ended(self._clock(), lost=lost)

        return watched

    def _began(self) -> None:
        self._progress.began(self._clock())
        self._keep_looking()

    def _keep_looking(self) -> None:
        if self._hear is not None and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look(self._hear))

    async def _look(self, hear: HeartbeatSource) -> None:
        """Ask the trunks regularly while it is unclear whether they make progress."""
        while self._progress.in_question:
            await asyncio.sleep(LOOK_S)
            if not self._progress.wants_to_hear(self._clock()):
                continue
            try:
                async with asyncio.timeout(HEAR_S):
                    heard = await hear()
            except Exception as error:
                # Any error means that nothing was heard: no progress, which `is_ready` shows.
                logger.info("a trunk does not answer: %r", error)
                continue
            if heard is None:
                self._progress.waking(self._clock())
            else:
                self._progress.heard(heard, self._clock())


class Health:
    """The answers to probes of one process; none of them waits for another process."""

    def __init__(
        self,
        models: Mapping[str, ModelHealth],
        *,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take each model's health, under all of its names; the mapping may change.

        ``leaving`` tells whether new requests are refused.
        """
        self._models = models
        self._leaving = leaving

    async def live(self) -> bool:
        """Return True: a process that can answer is alive."""
        return True

    async def started(self) -> bool:
        """Return True: the ingress only starts to serve once all models have been up."""
        return True

    async def ready(self, model: str | None = None) -> bool:
        """Return whether a request for ``model``, or for every model if None, would make progress.

        Raises UnknownModel.
        """
        if model is not None and model not in self._models:
            raise UnknownModel("there is no such model", param="model")
        asked = self._models.values() if model is None else (self._models[model],)
        for one in asked:
            one.probed()
        return not self._leaving() and all(one.is_ready for one in asked)
