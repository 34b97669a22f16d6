"""The interface to transformers' continuous batching: all private names that we rely on are here.

``tests/integration/engine/test_batching_seam.py`` pins these names and the order of the calls, and
fails loudly when transformers changes them:

    loop body:  prepare_next_batch -> _generation_step -> update_batch -> output_router
    step:       model forward (our router may call fail_rows) -> model_runner._sample

Shape suffixes: R = rows of logits (one per request with a new token), S = those that are sampled, V
= vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from ....cluster.routing.expert_options import RowGroups
from ....cluster.tracing.layers import StepTrace
from ....proto.errors import (
    EngineError,
    InternalError,
    MoesaicError,
    UnsupportedModel,
    describe_error,
)
from ..embedding import Encoder
from ..sampling import RequestSampler, choose, not_finite
from ..step_log import log_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine import EngineConfig
    from ..streams import Stream, Streams


SCHEDULER = "moesaic"


class RankScheduler(FIFOScheduler):
    """Admits the waiting requests by their rank.

    After an eviction transformers admits no new request until one *finishes*. If the running
    ones are cancelled instead, that never happens and the waiting ones starve.
    """

    rank: Callable[[str], tuple[int, int]]  # request id -> rank; the smallest comes first

    def _get_waiting_candidates(self) -> list[RequestState]:
        return sorted(super()._get_waiting_candidates(), key=lambda one: self.rank(one.request_id))

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


SCHEDULER_MAPPING[SCHEDULER] = RankScheduler


logger = logging.getLogger(__name__)

# After this many restarts in a row, without a good step in between, the engine is not healthy.
MAX_BARREN_RESTARTS = 3
MAX_RESTART_DELAY_S = 5.0


class _OutputDelivery(OutputRouter):
    """Passes every output to its stream at once, so that the library's own queue stays empty."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def deliver(self, output: GenerationOutput) -> None:
        self._streams.deliver([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._streams.deliver(outputs)


class BatchingLoop(ContinuousBatchingManager):
    """transformers' manager, with a thread that survives exceptions and faults of single rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        eos_token_ids: Sequence[int],
        streams: Streams,
        encoder: Encoder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        with _refusing_unsupported():
            super().__init__(
                model,  # pyright: ignore[reportArgumentType]  (their protocol is a nn.Module)
                GenerationConfig(do_sample=False, eos_token_id=list(eos_token_ids) or -1),
                _manager_config(config, model.device),
            )
        self.streams = streams
        self._clock = clock
        self._encoder = encoder
        self.output_router = _OutputDelivery(streams)
        self._generator = torch.Generator(model.device)
        self._generator.seed()
        self._closing = threading.Event()
        self._in_forward = False
        self._faults: dict[str, MoesaicError] = {}
        self._barren_restarts = 0
        self.restarts = 0
        self.steps = 0
        self.last_error: str | None = None
        self.last_beat = self._clock()

    # ------------------------------------------------------------------ the owner's thread

    def allocate(self) -> int:
        """Make the KV cache; return the tokens that one request can have in it, alone."""
        with _refusing_unsupported():
            self.batch_processor = self._create_batch_processor()
        return infer_max_single_request_tokens(self.batch_processor.cache)

    def start(self) -> None:
        # A daemon thread, so that a forward that never returns cannot keep the process alive.
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, name="moesaic-engine", daemon=True
        )
        self._generation_thread.start()

    def submit(self, request_id: str, stream: Stream, tokens: Sequence[int], left: int) -> bool:
        """Queue a request; return False where the loop is restarting or closing.

        ``tokens``: the prompt and what was generated; ``left``: how many more tokens there
        may be.
        """
        taken = self.add_request(
            list(tokens), request_id=request_id, max_new_tokens=left, streaming=True
        )
        # Checked last: when the loop ends, it fails everything that was queued before `close`.
        return taken is not None and not self._closing.is_set()

    def wake(self) -> None:
        """Wake the loop, since the encoder has work."""
        self._wake_up_loop.set()

    def close(self, timeout_s: float) -> None:
        """Stop the loop.

        Raises EngineError if its thread is still inside a step after ``timeout_s``.
        """
        self._closing.set()
        self.background_thread_status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)
        self._wake_up_loop.set()
        # Joins the thread, frees the cache and restores the model's own attention.
        self.stop(block=True, timeout=timeout_s, hard_stop=True)
        if self.is_running():
            raise EngineError(f"the engine's loop did not stop within {timeout_s} s")
        self.destroy()

    @property
    def running(self) -> int:
        processor = self.batch_processor
        return len(processor.scheduler.active_requests) if processor else 0

    @property
    def cache_free(self) -> float:
        processor = self.batch_processor
        return float(processor.cache.compute_free_capacity()) if processor else 1.0

    @property
    def healthy(self) -> bool:
        return self.is_running() and self._barren_restarts < MAX_BARREN_RESTARTS

    # ------------------------------------------------------------------ the loop's thread

    def _run_generation_loop(self) -> None:
        while True:
            super()._run_generation_loop()
            # For requests that were submitted after transformers had emptied its queues.
            self.streams.fail_all(self._why_ended())
            # Cleared before `_closing` is checked: `close` sets `_closing` before it asks for the
            # stop, so if this clears a stop, `_closing` is set already.
            self.background_thread_status.clear()
            if self._closing.is_set():
                return
            logger.error("the engine's loop failed and restarts: %s", self.last_error)
            self.restarts += 1
            if self._barren_restarts:
                self._closing.wait(min(0.1 * 2**self._barren_restarts, MAX_RESTART_DELAY_S))
            self._barren_restarts += 1
            if self.batch_processor is not None:
                # The failed step may have left half-written blocks, which no prompt may reuse.
                self.batch_processor.cache.reset()

    def _fail_all_remaining_requests(
        self, error: Exception, batch_processor: ContinuousBatchProcessor | None
    ) -> None:
        self.last_error = None if self._closing.is_set() else describe_error(error)
        self.streams.fail_all(self._why_ended())
        super()._fail_all_remaining_requests(error, batch_processor)

    def _why_ended(self) -> EngineError:
        if self._closing.is_set():
            return EngineError("the engine was closed")
        return EngineError(f"the engine failed and restarts ({self.last_error})")

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        processor.model_runner._sample = self._sample
        scheduler = processor.scheduler
        assert isinstance(scheduler, RankScheduler)
        scheduler.rank = self.streams.rank
        return processor

    def _generation_loop_body(
        self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool
    ) -> bool:
        self.last_beat = self._clock()
        if self._encoder.waits:
            self._encode()
        return super()._generation_loop_body(batch_processor, bootstrapping)

    def _encode(self) -> None:
        own, paged = self._original_attn_impl, self.model.config._attn_implementation
        if own is None or paged is None:
            self._encoder.step()
            return
        # Paged attention only works with a paged cache, and the encoder has none.
        self.model.set_attn_implementation(own)
        try:
            self._encoder.step()
        finally:
            self.model.set_attn_implementation(paged)

    def _generation_step(self) -> None:
        self._faults.clear()
        self._in_forward = True
        try:
            super()._generation_step()
        finally:
            self._in_forward = False
        if self._faults:
            self._drop_faulted()
        if self.streams.some_expert_options:
            self._keep_to_themselves()
        self.steps += 1
        self._barren_restarts = 0

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        """Fail the requests that own ``rows``; see `TransformersEngine.fail_rows`.

        The first error of a request counts.
        """
        for _, request_id in self._owners(rows):
            self._faults.setdefault(request_id, error)

    def row_groups(self) -> RowGroups | None:
        """Return expert options by rows; see `TransformersEngine.row_groups`."""
        if not self._in_forward or not self.streams.some_expert_options:
            return None
        return [
            (request.query_length, self.streams.expert_options(request.state.request_id))
            for request in self._requests_in_batch()
        ]

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        """Note rows without some experts; see `TransformersEngine.drop_rows`."""
        for row, request_id in self._owners(sorted(dropped)):
            self.streams.drop(request_id, dropped[row])

    def log_step(self, router: str, step: int) -> StepTrace | None:
        """Log which requests the forward pass has; see `TransformersEngine.log_step`.

        A forward pass outside of the loop has none of them.
        """
        if not self._in_forward:
            return None
        return log_step(
            router, step, lambda: [one.state.request_id for one in self._requests_in_batch()]
        )

    def _owners(self, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield (row, id of its request) for those of ``rows`` that are not padding."""
        if not self._in_forward:
            raise InternalError("a row was reported outside of a forward pass of the model")
        requests = self._requests_in_batch()
        # Requests lie one after the other in the batch: i has the rows ends[i - 1] to ends[i] - 1.
        ends = list(accumulate(request.query_length for request in requests))
        for row in rows:
            owner = bisect_right(ends, row)
            if owner < len(requests):
                yield row, requests[owner].state.request_id

    def _drop_faulted(self) -> None:
        processor = self._processor()
        for request in self._requests_in_batch():
            if request.state.request_id in self._faults:
                # The step wrote wrong keys and values, so later prompts must not reuse its blocks.
                request.complete_blocks = {}
                processor.scheduler.set_request_cancellation(request.state.request_id)
        self.streams.post(self._faults)

    def _keep_to_themselves(self) -> None:
        """Keep blocks that were computed without some experts out of the prefix cache."""
        for request in self._requests_in_batch():
            if not self.streams.is_whole(request.state.request_id):
                request.complete_blocks = {}

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Write the next tokens of ``scores (1, R, V)``, fp32, to ``output_ids[0, :R]``.

        Rows of greedy requests get the same token as in transformers.
        """
        scores_RV = scores[0]
        tokens_R = scores_RV.argmax(dim=-1)
        # argmax treats a NaN as the largest, so the best score tells whether a row is finite.
        finite_R = scores_RV.gather(1, tokens_R[:, None])[:, 0].isfinite().tolist()
        # The first rows belong to the requests with a new token; the rest is padding.
        live = [r.state.request_id for r in self._requests_in_batch() if r.has_new_token]
        rows: list[int] = []
        samplers: list[RequestSampler] = []
        for row, (request_id, finite) in enumerate(zip(live, finite_R, strict=False)):
            sampler = self.streams.sampler(request_id)
            if request_id in self._faults:
                continue  # the request has failed and must not advance its sampler
            if not finite:
                self._faults.setdefault(request_id, not_finite("logits"))
            elif sampler is not None and not sampler.trivial:
                rows.append(row)
                samplers.append(sampler)
        if rows:
            rows_S = torch.tensor(rows, device=scores.device)
            tokens_S = choose(scores_RV[rows_S], samplers, self._generator)
            tokens_R[rows_S] = tokens_S
            for row, sampler, token in zip(rows, samplers, tokens_S.tolist(), strict=True):
                sampler.chose(token, scores_RV[row])
            for row, sampler in zip(rows, samplers, strict=True):
                if (fault := sampler.fault) is not None:
                    self._faults.setdefault(live[row], fault)
        output_ids[0, : tokens_R.size(0)].copy_(tokens_R)

    def _requests_in_batch(self) -> list[FutureRequestState]:
        """Return the requests in the order of their rows."""
        batch = self._processor().inputs_and_outputs
        assert isinstance(batch, ContinuousBatchingIOs)  # not its asynchronous variant
        return batch.requests_in_batch

    def _processor(self) -> ContinuousBatchProcessor:
        assert self.batch_processor is not None
        return self.batch_processor


@contextmanager
def _refusing_unsupported() -> Iterator[None]:
    try:
        yield
    except (ValueError, AttributeError) as error:
        raise UnsupportedModel(f"the model cannot be batched continuously: {error}") from error


def _manager_config(config: EngineConfig, device: torch.device) -> ContinuousBatchingConfig:
    on_cpu_default = 8192 // config.page_size if device.type == "cpu" else None
    return ContinuousBatchingConfig(
        page_size=config.page_size,
        num_blocks=config.num_blocks or on_cpu_default,
        max_batch_tokens=config.max_batch_tokens,
        max_requests_per_batch=config.max_requests,
        max_memory_percent=config.cache_memory_fraction,
        # No CUDA graph can capture a step, which calls other processes for every layer's experts.
        # No asynchronous batching: faults must be known before the next step is planned.
        use_cuda_graph=False,
        use_async_batching=False,
        # True would look for kernels on the hub. The caller chooses the attention.
        auto_switch_to_flash=False,
        scheduler_type=SCHEDULER,
    )
