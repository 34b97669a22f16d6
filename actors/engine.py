"""The trunk's engine: token ids in, token ids out, many requests at once.

``Engine`` is the seam between the service (tokenizers, HTTP, Ray) and what runs the model; nothing
here knows about either side. ``TransformersEngine`` is the first implementation.

Two threads meet here: the engine's loop steps the model; callers live in asyncio. The loop's thread
only ever posts to a stream (``streams.py``), and only the caller adds and removes streams.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from ..cluster.missing import WAIT, Dropped, MissingExpert, RowGroups
from ..proto.errors import Busy, EngineError, MoesaicError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .batching import BatchingLoop
    from .streams import Stream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one request's tokens are chosen; the values were checked by the caller."""

    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: of all tokens
    min_p: float = 0.0  # tokens with less than this part of the likeliest one's probability are out
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added)
    seed: int | None = None
    logprobs: int | None = (
        None  # likeliest tokens that are given beside each; None: no log-probabilities
    )
    missing: MissingExpert = WAIT


class TokenLogprob(NamedTuple):
    """One generated token, by the model's own distribution: before bias, penalties, temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, the first one first


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a request, without the end-of-text token; the last one says why it ended."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    dropped: Dropped | None = None  # what the request went without so far
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, if they were asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may ask for, in tokens, and how many requests are admitted at once."""

    max_prompt_tokens: int
    max_total_tokens: int
    max_requests: int
    vocab_size: int

    def check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Raises RequestError that names ``prompt``, ``max_tokens`` or ``logit_bias``."""
        prompt_tokens, max_tokens = len(prompt_ids), sampling.max_tokens
        if prompt_tokens < 1:
            raise RequestError("the prompt is empty", param="prompt")
        if prompt_tokens > self.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; {self.max_prompt_tokens} are possible",
                param="prompt",
            )
        if max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}; it must be >= 1", param="max_tokens")
        if prompt_tokens + max_tokens > self.max_total_tokens:
            raise RequestError(
                f"prompt ({prompt_tokens} tokens) and max_tokens ({max_tokens}) make "
                f"{prompt_tokens + max_tokens}; {self.max_total_tokens} are possible",
                param="max_tokens",
            )
        biased = [token_id for token_id, _ in sampling.logit_bias]
        for param, token_ids in (("prompt", prompt_ids), ("logit_bias", biased)):
            for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{param}: token id {token_id} is not in the vocabulary "
                        f"(0 to {self.vocab_size - 1})",
                        param=param,
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot; the defaults are those of an engine that is not running."""

    running: int = 0
    waiting: int = 0
    restarts: int = 0  # after a failed step
    last_error: str | None = None
    steps: int = 0
    seconds_since_beat: float = 0.0  # since the loop last looked for work
    cache_free: float = 1.0  # share of the KV cache, 0..1
    healthy: bool = False  # False also when restarting does not help


class Engine(Protocol):
    """Runs requests of one model. All methods may be called from any thread with an event loop."""

    @property
    def limits(self) -> Limits: ...

    def start(self) -> None:
        """Allocates the cache and starts the loop; raises when the model cannot be batched."""
        ...

    def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Delta, None]:
        """Yields until a Delta has a finish reason; closing the generator cancels the request.

        Raises RequestError, Busy, EngineError (retryable), or what ended just this request.
        """
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Ends the requests in flight with EngineError, the loop and its thread; repeatable."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes of an engine; None: 8,192 cached tokens on a CPU, on CUDA what fits."""

    page_size: int = 32  # tokens per KV page
    num_blocks: int | None = None  # pages per layer
    cache_memory_fraction: float = 0.5  # of what is free, where num_blocks is None
    max_batch_tokens: int = 512  # per step: bounds how long a prefill delays the others
    max_requests: int = 32  # per step
    max_waiting: int = 256  # beyond those that run
    stall_timeout_s: float = 120.0  # no step for so long: requests end with EngineError
    close_timeout_s: float = 10.0


class TransformersEngine:
    """Continuous batching by transformers' own manager (``batching.BatchingLoop``)."""

    def __init__(self, model: PreTrainedModel, *, config: EngineConfig | None = None) -> None:
        self._model = model
        self._config = config or EngineConfig()
        self._ids = itertools.count()
        self._loop: BatchingLoop | None = None
        self._limits: Limits | None = None

    @property
    def limits(self) -> Limits:
        if self._limits is None:
            raise EngineError("the engine was not started")
        return self._limits

    def start(self) -> None:
        # torch and transformers are imported here only; a process of HTTP needs neither.
        from .batching import BatchingLoop, eos_token_ids
        from .streams import Streams

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
        loop.start()
        self._loop = loop

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Delta, None]:
        loop = self._admit(prompt_ids, sampling)
        # A caller may use an id twice; the loop must not see it twice.
        key = f"{request_id}#{next(self._ids)}"
        stream = loop.streams.open(key, sampling, prompt_ids)
        finished = False
        try:
            if not loop.submit(key, prompt_ids, sampling.max_tokens):
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

    def _admit(self, prompt_ids: Sequence[int], sampling: Sampling) -> BatchingLoop:
        loop = self._running()
        self.limits.check(prompt_ids, sampling)
        if len(loop.streams) >= self.limits.max_requests:
            raise Busy(f"{len(loop.streams)} requests are running or waiting; try again later")
        return loop

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
            waiting=max(0, len(loop.streams) - running),
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
