"""transformers as a trunk's engine.

Requests run in its continuous batching (`continuous_batching.BatchingLoop`), or, for models that it
cannot take, in static batches (`static_batching.StaticBatchLoop`).

Two threads meet here: the engine's loop steps the model, and callers live in asyncio. The loop's
thread only posts to streams (``streams.py``); only callers add and remove streams.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....cluster.routing.expert_options import RowGroups
from ....cluster.tracing.layers import StepTrace
from ....proto.errors import Busy, EngineError, MoesaicError, RequestError, UnsupportedModel
from ..embedding import Encoder
from ..end_of_text import end_of_text
from ..engine import Delta, EngineConfig, EngineStats, Pooling, RequestLimits, Sampling
from ..expert_wait import ParkedRequests
from ..grammar import Grammar, Grammars
from ..sampling import RequestSampler
from ..streams import Stream, Streams
from ..traced import traced_request
from .continuous_batching import BatchingLoop
from .static_batching import StaticBatchLoop

logger = logging.getLogger(__name__)

# The sampling of a text that only becomes a vector.
_NO_ANSWER = Sampling(max_tokens=1)

Loop = BatchingLoop | StaticBatchLoop

# Keys of configurations (multi-head latent attention, mixture of attention) in which keys and
# values may have other sizes than transformers' paged cache expects. It accepts such a model, and
# then its first step fails.
_SUSPECT = ("kv_lora_rank", "v_head_dim", "kv_channels")
# Keys of configurations that transformers' packed batches silently compute wrongly: a cap on
# attention logits, and experts with a capacity per sequence.
_NOT_PACKED = ("attn_logit_softcapping", "router_capacity_factor_eval")


class TransformersEngine:
    """Runs requests in batches: continuous ones by transformers' own manager, or static ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: EngineConfig | None = None,
        tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an engine of ``model``.

        ``tokenizer`` loads the model's tokenizer at the start, and again for the first
        answer of a given form. That takes a second; keeping it would take tens of MB in
        every trunk. Without it there are no such answers, and only the configurations say
        what ends a text.
        """
        self._model = model
        self._clock = clock
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._config = config or EngineConfig()
        self._ids, self._arrivals = itertools.count(), itertools.count()
        self._parked = ParkedRequests(self._config.park_s, self._running, clock)
        self._encoder = Encoder(model, self._config.max_batch_tokens)
        self._embedding = 0  # calls of `embed` in progress
        self._loop: Loop | None = None
        self._limits: RequestLimits | None = None

    @property
    def limits(self) -> RequestLimits:
        if self._limits is None:
            raise EngineError("the engine was not started")
        return self._limits

    def start(self) -> None:
        if self._loop is not None:
            return
        generation = getattr(self._model, "generation_config", None)
        eos = end_of_text(self._model.config, generation, self._tokenizer)
        loop, total = self._make_loop(eos)
        text_config = self._model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is not None:
            total = min(total, int(positions))
        self._limits = RequestLimits(
            max_prompt_tokens=total - 1,
            max_total_tokens=total,
            max_requests=self._config.max_requests + self._config.max_waiting,
            vocab_size=int(text_config.vocab_size),
        )
        if self._tokenizer is not None:
            self._grammars = Grammars(self._tokenizer, self._limits.vocab_size, eos)
        self._loop = loop

    def _make_loop(self, eos: Sequence[int]) -> tuple[Loop, int]:
        """Return a loop, and the tokens that one request can have.

        The loop is continuous batching where transformers supports it, else static
        batching.
        """
        model, attention = self._model, self._model.config._attn_implementation
        text_config = model.config.get_text_config()
        packs = not any(getattr(text_config, name, None) for name in _NOT_PACKED)
        if packs and not model.config.is_encoder_decoder:
            try:
                continuous = BatchingLoop(
                    model, self._config, eos, Streams(eos), self._encoder, self._clock
                )
                total = continuous.allocate()
                continuous.start()
                if any(hasattr(text_config, name) for name in _SUSPECT):
                    self._probe(continuous)
                return continuous, total
            except UnsupportedModel as error:
                # The failed attempt may have changed the model's attention already.
                model.set_attn_implementation(attention or "eager")
                logger.warning("requests run in static batches: %s", error)
        static = StaticBatchLoop(model, self._config, eos, Streams(eos), self._encoder, self._clock)
        static.start()
        return static, static.allocate()

    def _probe(self, loop: BatchingLoop) -> None:
        """Generate two tokens, to see whether the steps work. Raises UnsupportedModel."""

        async def probe() -> None:
            sampler = RequestSampler(Sampling(max_tokens=2), [0])
            stream = loop.streams.open("probe", sampler, 0)
            try:
                loop.submit("probe", stream, [0], 2)
                while (await self._next(loop, stream)).finish_reason is None:
                    continue
            finally:
                loop.streams.close("probe")

        # A thread, since the caller of `start` may be inside an event loop.
        with ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(asyncio.run, probe()).result()
            except EngineError as error:
                loop.close(self._config.close_timeout_s)
                raise UnsupportedModel(f"continuous batching fails: {error}") from None
            except MoesaicError as error:
                # Experts may be missing now, which says nothing about the model.
                logger.warning("continuous batching starts without the usual trial: %s", error)

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        """Yield a request's tokens; see `Engine.generate`."""
        self._admit(prompt_ids, sampling)
        grammar = await self._grammar(sampling, already)
        sampler = RequestSampler(sampling, prompt_ids, already, grammar)
        arrival = next(self._arrivals)

        def attempt(tokens: list[int], left: int) -> AsyncGenerator[Delta, None]:
            # A caller may use an id twice, but the loop needs unique ids.
            key = f"{request_id}#{next(self._ids)}"
            return self._attempt(key, tokens, left, sampler, arrival)

        trace = traced_request(request_id)
        parking = self._parked.generate(attempt, prompt_ids, sampling, already, trace)
        async with aclosing(parking) as deltas:
            async for delta in deltas:
                yield delta

    async def _grammar(self, sampling: Sampling, already: Sequence[int]) -> Grammar | None:
        if sampling.form is None:
            return None
        if self._grammars is None:
            raise RequestError(
                "response_format, strict tools and forced calls are not supported by this engine, "
                "which has no tokenizer",
                param="response_format",
            )
        # In a thread, since a large schema takes a second.
        return await asyncio.to_thread(self._grammars.begin, sampling.form, already)

    async def _attempt(
        self, key: str, tokens: list[int], left: int, sampler: RequestSampler, arrival: int
    ) -> AsyncGenerator[Delta, None]:
        """Yield tokens until the request ends, or lacks an expert."""
        loop = self._running()
        stream = loop.streams.open(key, sampler, arrival)
        finished = False
        try:
            if not loop.submit(key, stream, tokens, left):
                raise EngineError("the engine is restarting; send the request again")
            while not finished:
                delta = await self._next(loop, stream)
                finished = delta.finish_reason is not None
                yield delta
        finally:
            loop.streams.close(key)
            if not finished:
                loop.cancel_request(key)

    async def _next(self, loop: Loop, stream: Stream) -> Delta:
        while True:
            try:
                return await stream.next(self._config.stall_timeout_s)
            except TimeoutError:
                self._check_beat(loop)

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, request_id: str = ""
    ) -> np.ndarray:
        """Return one vector per prompt; see `EmbeddingEngine.embed`.

        A prompt that lacks an expert waits for it as requests do.
        """
        for prompt_ids in prompts:
            self.limits.check(prompt_ids, _NO_ANSWER)
        self._check_room()
        tasks = [asyncio.ensure_future(self._vector(one, pooling, request_id)) for one in prompts]
        self._embedding += 1
        try:
            return np.stack(await asyncio.gather(*tasks))
        finally:
            self._embedding -= 1
            for task in tasks:
                task.cancel()

    async def _vector(
        self, prompt_ids: Sequence[int], pooling: Pooling, request_id: str
    ) -> np.ndarray:
        found: list[np.ndarray] = []

        async def attempt(tokens: list[int], left: int) -> AsyncGenerator[Delta, None]:
            found.append(await self._encoded(tokens, pooling, request_id))
            yield Delta((), "length")

        async with aclosing(self._parked.generate(attempt, prompt_ids, _NO_ANSWER)) as deltas:
            async for _ in deltas:
                pass
        return found[-1]

    async def _encoded(
        self, token_ids: Sequence[int], pooling: Pooling, request_id: str
    ) -> np.ndarray:
        loop = self._running()
        vector = asyncio.wrap_future(self._encoder.submit(token_ids, pooling, request_id))
        loop.wake()
        try:
            while True:
                await asyncio.wait({vector}, timeout=self._config.stall_timeout_s)
                if vector.done():
                    return vector.result()
                self._check_beat(loop)
        except MoesaicError as error:
            raise copy.copy(error) from None  # texts of a batch may share it; raising changes it
        finally:
            vector.cancel()

    def _check_beat(self, loop: Loop) -> None:
        """Raise EngineError if the loop stands still; waiting in its queue is no error."""
        stalled_s = self._clock() - loop.last_beat
        if stalled_s >= self._config.stall_timeout_s:
            raise EngineError(f"the engine made no step for {stalled_s:.0f} s") from None

    def _admit(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self.limits.check(prompt_ids, sampling)
        self._check_room()

    def _check_room(self) -> None:
        requests = len(self._running().streams) + len(self._parked) + self._embedding
        if requests >= self.limits.max_requests:
            raise Busy(f"{requests} requests are running or waiting; try again later")

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        """End the requests that own these rows of the batch in flight, and no others.

        Call it inside the model's forward, in its thread; ``rows`` index the flat ``(T,
        H)`` hidden states. After the step each request's generator raises ``error``.

        The rows must hold finite numbers (zeros). All requests of a step share one masked
        attention: there the others weigh these rows with 0, and 0 x NaN is NaN.
        """
        owner = self._encoder if self._encoder.in_forward else self._running()
        owner.fail_rows(rows, error)

    def row_groups(self) -> RowGroups | None:
        """Return the requests' expert options, in the order of the batch's rows.

        None if no request of the batch in flight has any. Call it as `fail_rows`.
        """
        return None if self._encoder.in_forward else self._running().row_groups()

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        """Note rows for which a part of their experts was left out; call it as `fail_rows`."""
        self._running().drop_rows(dropped)

    def log_step(self, router: str, step: int) -> StepTrace | None:
        """Log which requests are in a forward pass that begins, at the debug level.

        ``step`` is its number in the ``router`` that computes its experts. Returns its trace, if
        one of its requests is sampled.
        """
        owner = self._encoder if self._encoder.in_forward else self._loop
        return None if owner is None else owner.log_step(router, step)

    def _running(self) -> Loop:
        if self._loop is None:
            raise EngineError("the engine is not running")
        return self._loop

    def stats(self) -> EngineStats:
        loop = self._loop
        if loop is None:
            return EngineStats()
        running = loop.running
        beat_s = self._clock() - loop.last_beat
        return EngineStats(
            running=running,
            waiting=max(0, len(loop.streams) - running) + len(self._parked),
            parked=len(self._parked),
            restarts=loop.restarts,
            last_error=loop.last_error,
            steps=loop.steps,
            heartbeat_age_s=beat_s,
            cache_free=loop.cache_free,
            healthy=loop.healthy and beat_s < self._config.stall_timeout_s,
        )

    def close(self) -> None:
        loop, self._loop = self._loop, None
        self._encoder.close(EngineError("the engine was closed"))
        if loop is not None:
            loop.close(self._config.close_timeout_s)
