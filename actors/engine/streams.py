"""Hand tokens from the engine's thread to the event loops of the requests' callers."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...cluster.routing.expert_fallback import DroppedExperts
from ...cluster.routing.expert_options import DEFAULT_EXPERT_OPTIONS, ExpertOptions
from ...proto.errors import EngineError, MoesaicError
from .engine import UNBOUNDED, Delta, FinishReason, TokenLogprob
from .sampling import RequestSampler

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput


logger = logging.getLogger(__name__)


class Stream:
    """One request's tokens on their way from the loop's thread to its caller's event loop."""

    def __init__(self, sampler: RequestSampler, arrival: int) -> None:
        self.sampler = sampler
        self.rank = sampler.sampling.priority, arrival
        self.loop = asyncio.get_running_loop()
        # Used by the loop's thread only:
        self.sent = 0
        self.ended = False
        self.dropped: DroppedExperts | None = None
        # Used by the event loop only:
        self._ready = asyncio.Event()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        self._dropped: DroppedExperts | None = None
        self._error: MoesaicError | None = None

    @property
    def expert_options(self) -> ExpertOptions:
        return self.sampler.sampling.expert_options

    def push(self, event: Delta | MoesaicError) -> None:
        if isinstance(event, Delta):
            self._tokens += event.token_ids
            self._logprobs += event.logprobs
            self._finish = event.finish_reason
            self._dropped = event.dropped
        else:
            self._error = event
        self._ready.set()

    async def next(self, timeout_s: float) -> Delta:
        """Return all tokens since the last call.

        Raises TimeoutError, or the request's error once all its tokens have been returned.
        """
        async with asyncio.timeout(timeout_s):
            await self._ready.wait()
        if self._error and not self._tokens:
            raise copy.copy(self._error)  # requests may share it, and raising changes it
        delta = Delta(tuple(self._tokens), self._finish, self._dropped, tuple(self._logprobs))
        self._tokens.clear()
        self._logprobs.clear()
        if not self._error:
            self._ready.clear()
        return delta


class Streams:
    """The requests in flight, by the loop's own ids.

    Callers open and close streams; the loop's thread calls all other methods, which never
    block.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._open: dict[str, Stream] = {}
        self._with_expert_options = 0
        self._eos_token_ids = frozenset(eos_token_ids)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str, sampler: RequestSampler, arrival: int) -> Stream:
        """Open a stream.

        Of requests with the same priority the one with the smallest ``arrival`` leaves the
        queue first.
        """
        stream = self._open[request_id] = Stream(sampler, arrival)
        self._with_expert_options += stream.expert_options != DEFAULT_EXPERT_OPTIONS
        return stream

    def close(self, request_id: str) -> None:
        self._with_expert_options -= (
            self._open.pop(request_id).expert_options != DEFAULT_EXPERT_OPTIONS
        )

    def sampler(self, request_id: str) -> RequestSampler | None:
        stream = self._open.get(request_id)
        return stream.sampler if stream else None

    def rank(self, request_id: str) -> tuple[int, int]:
        """Return the key by which requests leave the queue, smallest first.

        Cancelled requests come before all others.
        """
        stream = self._open.get(request_id)
        return stream.rank if stream else (-UNBOUNDED, 0)

    @property
    def some_expert_options(self) -> bool:
        """Whether any open request has expert options."""
        return self._with_expert_options > 0

    def expert_options(self, request_id: str) -> ExpertOptions:
        stream = self._open.get(request_id)
        return stream.expert_options if stream else DEFAULT_EXPERT_OPTIONS

    def is_whole(self, request_id: str) -> bool:
        """Return whether the request has had all experts that its tokens chose."""
        stream = self._open.get(request_id)
        return stream is None or (
            stream.dropped is None and stream.expert_options.experts_per_token is None
        )

    def drop(self, request_id: str, part: float) -> None:
        stream = self._open.get(request_id)
        if stream is not None:
            stream.dropped = (stream.dropped or DroppedExperts(0.0, 0)).and_then(part)

    def dropped(self, request_id: str) -> DroppedExperts | None:
        stream = self._open.get(request_id)
        return stream.dropped if stream else None

    def deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        self.post({output.request_id: self._event(output) for output in outputs})

    def fail_all(self, error: MoesaicError) -> None:
        self.post(dict.fromkeys(list(self._open), error))

    def _event(self, output: GenerationOutput) -> Delta | MoesaicError:
        stream = self._open.get(output.request_id)
        if output.error is not None or stream is None:
            return EngineError(f"the engine failed: {output.error}")
        new = tuple(output.generated_tokens[stream.sent :])
        stream.sent += len(new)
        logprobs = stream.sampler.take_logprobs(len(new))
        if not output.is_finished():
            return Delta(new, None, stream.dropped, logprobs)
        if new and new[-1] in self._eos_token_ids:
            return Delta(new[:-1], "stop", stream.dropped, logprobs[:-1])
        return Delta(new, "length", stream.dropped, logprobs)

    def post(self, events: Mapping[str, Delta | MoesaicError]) -> None:
        """Hand events to their event loops, with one wake-up for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Delta | MoesaicError]]] = {}
        for request_id, event in events.items():
            stream = self._open.get(request_id)
            if stream is None or stream.ended:  # cancelled, or failed before
                continue
            stream.ended = not isinstance(event, Delta) or event.finish_reason is not None
            by_loop.setdefault(stream.loop, []).append((stream, event))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_push_all, batch)
            except RuntimeError:
                # Only a closed event loop refuses, and then no reader is left.
                logger.warning(
                    "the tokens of %d requests are dropped, since the event loop of their callers "
                    "is closed",
                    len(batch),
                )


def _push_all(batch: list[tuple[Stream, Delta | MoesaicError]]) -> None:
    for stream, event in batch:
        stream.push(event)
