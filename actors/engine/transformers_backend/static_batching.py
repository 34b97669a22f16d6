"""Static batching, for models that transformers' continuous batching cannot take.

These have multi-head latent attention, linear attention in some layers, or an encoder and a
decoder. Requests that arrive together run as one padded batch (`StaticBatch`). The batches take
turns, one token each, and no request joins a batch that runs. This is simple and correct rather
than fast; vLLM supports most of these models.

Shape suffixes: R = requests of a batch, V = vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....cluster.routing.expert_options import RowGroups
from ....cluster.tracing.layers import StepTrace
from ....proto.errors import EngineError, InternalError, MoesaicError, describe_error
from ..embedding import Encoder
from ..engine import Delta, EngineConfig
from ..sampling import choose, not_finite
from ..step_log import log_step
from ..streams import Stream, Streams
from .static_batch import BatchedRequest, StaticBatch, together

logger = logging.getLogger(__name__)

# After this many failed steps in a row the engine is not healthy.
MAX_FAILED = 3
_IDLE_S = 0.5
_DEFAULT_TOKENS = 8192  # in the caches of all requests


class StaticBatchLoop:
    """A thread that steps the static batches, with the same interface as `BatchingLoop`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        eos_token_ids: Sequence[int],
        streams: Streams,
        encoder: Encoder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.streams = streams
        self._clock = clock
        self._encoder = encoder
        self.restarts = 0
        self.steps = 0
        self.last_error: str | None = None
        self.last_beat = self._clock()
        self._model = model
        self._config = config
        self._eos_token_ids = frozenset(eos_token_ids)
        self._generator = torch.Generator(model.device)
        self._generator.seed()
        self._cache_tokens = (config.num_blocks or 0) * config.page_size or _DEFAULT_TOKENS
        self._failed = 0
        self._pads = True
        self._closing = threading.Event()
        # The condition's lock guards these two; only the thread uses the rest.
        self._changed = threading.Condition()
        self._waiting: dict[str, BatchedRequest] = {}
        self._cancelled: set[str] = set()
        self._batches: list[StaticBatch] = []
        self._current: StaticBatch | None = None  # the one whose forward runs
        self._faults: dict[str, MoesaicError] = {}
        self._thread = threading.Thread(target=self._run, name="moesaic-engine", daemon=True)

    # ---- the owner's threads --------------------------------------------------------------------

    def allocate(self) -> int:
        """Return the tokens that one request can have, alone."""
        return self._cache_tokens

    def start(self) -> None:
        self._thread.start()

    def submit(self, request_id: str, stream: Stream, tokens: Sequence[int], left: int) -> bool:
        """Queue a request; return False where the loop is closing.

        ``tokens``: the prompt and what was generated; ``left``: how many more tokens there
        may be.
        """
        prompt = len(stream.sampler.prompt_ids)
        request = BatchedRequest(
            request_id, tokens[:prompt], left, stream.sampler, generated=list(tokens[prompt:])
        )
        with self._changed:
            if self._closing.is_set():
                return False
            self._waiting[request_id] = request
            self._changed.notify()
        return True

    def cancel_request(self, request_id: str) -> None:
        with self._changed:
            if self._waiting.pop(request_id, None) is None:
                self._cancelled.add(request_id)

    def wake(self) -> None:
        """Wake the loop, since the encoder has work."""
        with self._changed:
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Stop the loop.

        Raises EngineError if its thread is still inside a step after ``timeout_s``.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineError(f"the engine's loop did not stop within {timeout_s} s")

    @property
    def running(self) -> int:
        return sum(len(batch.requests) for batch in self._batches)

    @property
    def cache_free(self) -> float:
        return 1.0 - self._reserved() / self._cache_tokens

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._failed < MAX_FAILED

    # ---- the loop's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            self.last_beat = self._clock()
            self._drop_cancelled()
            self._encoder.step()
            self._admit()
            for batch in list(self._batches):
                self._step_or_fail(batch)
                if not batch.requests:
                    self._batches.remove(batch)
            with self._changed:
                waits = self._batches or self._waiting or self._encoder.waits
                if not waits and not self._closing.is_set():
                    self._changed.wait(_IDLE_S)
        self.streams.fail_all(EngineError("the engine was closed"))

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
        if cancelled:
            for batch in self._batches:
                batch.keep([n for n, r in enumerate(batch.requests) if r.key not in cancelled])
            self._batches = [batch for batch in self._batches if batch.requests]

    def _reserved(self) -> int:
        return sum(r.most_tokens for batch in self._batches for r in batch.requests)

    def _admit(self) -> None:
        """Make one more batch of the waiting requests that fit into the caches."""
        with self._changed:
            ranked = sorted(self._waiting.values(), key=lambda one: self.streams.rank(one.key))
            room = self._cache_tokens - self._reserved()
            fitting: list[BatchedRequest] = []
            for request in ranked[: self._config.max_requests - self.running]:
                room -= request.most_tokens
                if room < 0:
                    break
                fitting.append(request)
            if not fitting:
                return
            most = self._config.max_batch_tokens
            count = together(self._model, fitting, most, pads=self._pads)
            for request in fitting[:count]:
                del self._waiting[request.key]
        self._batches.append(StaticBatch(self._model, fitting[:count]))

    def _step_or_fail(self, batch: StaticBatch) -> None:
        try:
            self._step(batch)
            self._failed = 0
        except Exception as error:
            if batch.is_first_padded:
                logger.warning(
                    "the model fails on padded texts, so all texts of a static batch have the same "
                    "length from now on: %s",
                    describe_error(error),
                )
                self._pads = False
                self._batches += [StaticBatch(self._model, [one]) for one in batch.requests]
                batch.keep([])
                return
            # Any error: the other batches must continue.
            keys = [request.key for request in batch.requests]
            logger.exception("a step of a static batch failed", extra={"requests": keys})
            self.last_error = describe_error(error)
            self.restarts += 1
            self._failed += 1
            failed = EngineError(f"the engine failed ({self.last_error})")
            self.streams.post({request.key: failed for request in batch.requests})
            batch.keep([])

    def _step(self, batch: StaticBatch) -> None:
        self._faults.clear()
        self._current = batch
        try:
            with torch.no_grad():
                logits_RV = batch.forward()
        finally:
            self._current = None
        tokens = self._choose(batch, logits_RV)
        batch.take(tokens)
        deltas = {
            request.key: self._delta(request, token)
            for request, token in zip(batch.requests, tokens, strict=True)
            if request.key not in self._faults
        }
        self.streams.post({**deltas, **self._faults})
        going_on = {key for key, delta in deltas.items() if delta.finish_reason is None}
        batch.keep([n for n, r in enumerate(batch.requests) if r.key in going_on])
        self.steps += 1

    def _choose(self, batch: StaticBatch, logits_RV: Tensor) -> list[int]:
        tokens = logits_RV.argmax(dim=-1).tolist()
        rows: list[int] = []
        for row, request in enumerate(batch.requests):
            if request.key in self._faults:
                continue
            # argmax treats a NaN as the largest, so the best logit tells whether all are finite.
            if not bool(logits_RV[row, tokens[row]].isfinite()):
                self._faults[request.key] = not_finite("logits")
            elif not request.sampler.trivial:
                rows.append(row)
        if rows:
            samplers = [batch.requests[row].sampler for row in rows]
            chosen = choose(logits_RV[rows], samplers, self._generator).tolist()
            for row, sampler, token in zip(rows, samplers, chosen, strict=True):
                sampler.chose(token, logits_RV[row])
                tokens[row] = token
                if (fault := sampler.fault) is not None:
                    self._faults.setdefault(batch.requests[row].key, fault)
        return tokens

    def _delta(self, request: BatchedRequest, token: int) -> Delta:
        dropped = self.streams.dropped(request.key)
        logprobs = request.sampler.take_logprobs(1)
        if token in self._eos_token_ids:
            return Delta((), "stop", dropped)
        return Delta((token,), None if request.left else "length", dropped, logprobs)

    # ---- rows of the batch in flight ------------------------------------------------------------

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        """Fail the requests that own ``rows``; see `TransformersEngine.fail_rows`.

        The first error of a request counts.
        """
        for _, key in self._owners(rows):
            self._faults.setdefault(key, error)

    def row_groups(self) -> RowGroups | None:
        """Return expert options by rows; see `TransformersEngine.row_groups`."""
        batch = self._current
        if batch is None or not self.streams.some_expert_options:
            return None
        return [(batch.rows_each, self.streams.expert_options(one.key)) for one in batch.requests]

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        """Note rows without some experts; see `TransformersEngine.drop_rows`."""
        for row, key in self._owners(sorted(dropped)):
            self.streams.drop(key, dropped[row])

    def log_step(self, router: str, step: int) -> StepTrace | None:
        """Log which requests are in a forward pass; see `TransformersEngine.log_step`."""
        batch = self._current
        if batch is None:
            return None
        return log_step(router, step, lambda: [one.key for one in batch.requests])

    def _owners(self, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield (row, id of its request)."""
        batch = self._current
        if batch is None:
            raise InternalError("a row was reported outside of a forward pass of the model")
        for row in rows:
            owner = row // batch.rows_each
            if owner < len(batch.requests):
                yield row, batch.requests[owner].key
