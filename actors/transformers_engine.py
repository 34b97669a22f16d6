"""transformers as a trunk's engine: its continuous batching, over `batching.BatchingLoop`.

Two threads meet here: the engine's loop steps the model; callers live in asyncio. The loop's thread
only ever posts to a stream (``streams.py``), and only the caller adds and removes streams.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cluster.missing import RowGroups
from ..proto.errors import Busy, EngineError, MoesaicError, RequestError
from .batching import BatchingLoop, eos_token_ids
from .engine import Delta, EngineConfig, EngineStats, Limits, Sampling
from .grammar import Grammar, Grammars
from .parking import Parking
from .sampling import RequestSampler
from .streams import Stream, Streams


class TransformersEngine:
    """Continuous batching by transformers' own manager (``batching.BatchingLoop``)."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: EngineConfig | None = None,
        tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
    ) -> None:
        """Without ``tokenizer`` it cannot give answers of a JSON schema."""
        self._model = model
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._config = config or EngineConfig()
        self._ids, self._arrivals = itertools.count(), itertools.count()
        self._parking = Parking(self._config.park_s, self._running)
        self._loop: BatchingLoop | None = None
        self._limits: Limits | None = None

    @property
    def limits(self) -> Limits:
        if self._limits is None:
            raise EngineError("the engine was not started")
        return self._limits

    def start(self) -> None:
        if self._loop is not None:
            return
        eos = eos_token_ids(self._model)
        loop = BatchingLoop(self._model, self._config, eos, Streams(eos))
        total = loop.allocate()
        text_config = self._model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is not None:
            total = min(total, int(positions))
        self._limits = Limits(
            max_prompt_tokens=total - 1,
            max_total_tokens=total,
            max_requests=self._config.max_requests + self._config.max_waiting,
            vocab_size=int(text_config.vocab_size),
        )
        if self._tokenizer is not None:
            self._grammars = Grammars(self._tokenizer, self._limits.vocab_size, eos)
        loop.start()
        self._loop = loop

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`."""
        self._admit(prompt_ids, sampling)
        grammar = await self._grammar(sampling, already)
        sampler = RequestSampler(sampling, prompt_ids, already, grammar)
        arrival = next(self._arrivals)

        def attempt(tokens: list[int], left: int) -> AsyncGenerator[Delta, None]:
            # A caller may use an id twice; the loop must not see it twice.
            key = f"{request_id}#{next(self._ids)}"
            return self._attempt(key, tokens, left, sampler, arrival)

        parking = self._parking.generate(attempt, prompt_ids, sampling, already)
        async with aclosing(parking) as deltas:
            async for delta in deltas:
                yield delta

    async def _grammar(self, sampling: Sampling, already: Sequence[int]) -> Grammar | None:
        if sampling.json_schema is None:
            return None
        if self._grammars is None:
            raise RequestError("response_format: not with this engine", param="response_format")
        # A large schema takes a second.
        return await asyncio.to_thread(self._grammars.begin, sampling.json_schema, already)

    async def _attempt(
        self, key: str, tokens: list[int], left: int, sampler: RequestSampler, arrival: int
    ) -> AsyncGenerator[Delta, None]:
        """Until the request ends, or lacks an expert."""
        loop = self._running()
        stream = loop.streams.open(key, sampler, arrival)
        finished = False
        try:
            if not loop.submit(key, tokens, left):
                raise EngineError("the engine is restarting; send the request again")
            while not finished:
                delta = await self._next(loop, stream)
                finished = delta.finish_reason is not None
                yield delta
        finally:
            loop.streams.close(key)
            if not finished:
                loop.cancel_request(key)

    async def _next(self, loop: BatchingLoop, stream: Stream) -> Delta:
        while True:
            try:
                return await stream.next(self._config.stall_timeout_s)
            except TimeoutError:
                # Waiting behind others is no fault of the engine's; standing still is.
                stalled_s = time.monotonic() - loop.last_beat
                if stalled_s >= self._config.stall_timeout_s:
                    raise EngineError(f"the engine made no step for {stalled_s:.0f} s") from None

    def _admit(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self.limits.check(prompt_ids, sampling)
        requests = len(self._running().streams) + len(self._parking)
        if requests >= self.limits.max_requests:
            raise Busy(f"{requests} requests are running or waiting; try again later")

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        """Ends the requests that own these rows of the batch in flight, and only those.

        To be called inside the model's forward, in its thread; ``rows`` index the flat ``(T, H)``
        hidden states. After the step each request's generator raises ``error``.

        The rows must hold finite numbers (zeros): a step's requests share one masked attention, in
        which a row counts zero times for the others, and zero times NaN is NaN.
        """
        self._running().fail_rows(rows, error)

    def row_groups(self) -> RowGroups | None:
        """What the requests of the batch in flight want when experts are missing, in the order of
        their rows; None if all of them wait. To be called as `fail_rows` is."""
        return self._running().row_groups()

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        """These rows go without a part of their experts; to be called as `fail_rows` is."""
        self._running().drop_rows(dropped)

    def _running(self) -> BatchingLoop:
        if self._loop is None:
            raise EngineError("the engine is not running")
        return self._loop

    def stats(self) -> EngineStats:
        loop = self._loop
        if loop is None:
            return EngineStats()
        running = loop.running
        beat_s = time.monotonic() - loop.last_beat
        return EngineStats(
            running=running,
            waiting=max(0, len(loop.streams) - running) + len(self._parking),
            parked=len(self._parking),
            restarts=loop.restarts,
            last_error=loop.last_error,
            steps=loop.steps,
            seconds_since_beat=beat_s,
            cache_free=loop.cache_free,
            healthy=loop.healthy and beat_s < self._config.stall_timeout_s,
        )

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close(self._config.close_timeout_s)
