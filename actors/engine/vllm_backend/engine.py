"""vLLM as a trunk's engine: its scheduler, cache, attention and sampling, with the pool's experts.

vLLM's engine core runs inside this process, so that the router that its layers call knows which
request each row of a batch belongs to. One thread adds, steps and aborts requests; callers ask it
through a queue.

Shape suffixes: T = tokens of a batch.
"""

# vLLM is optional.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....cluster.card_memory import CONTEXT_BYTES, LEAST_WORKSPACE_BYTES
from ....models.folder.generation import generation_config
from ....models.folder.tokenizer import read_tokenizer
from ....models.trunk.config import read_config, torch_dtype
from ....models.trunk.describe import describe_model
from ....models.trunk.experts_layers import experts_layers, forms_anywhere
from ....models.trunk.trunk import is_unmodified, meta_model
from ....proto.errors import (
    Busy,
    ClusterError,
    EngineError,
    InternalError,
    UnsupportedModel,
    describe_error,
)
from ...engine.trunk_config import TrunkConfig
from ...router.pool_link import PoolLink
from ...runtime.devices import pick_device, take_for_trunk
from ..end_of_text import end_of_text
from ..engine import Delta, EngineConfig, EngineStats, RequestLimits, Sampling
from ..expert_wait import ParkedRequests
from ..grammar import Grammars
from ..sampling import RequestSampler
from ..streams import Streams
from ..traced import traced_request
from .plugin import in_pool
from .requests import Requests, going_on, parameters

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

log = logging.getLogger(__name__)

# How long the loop sleeps at most while it has no work.
_IDLE_S = 0.5
# vLLM reads these when it is imported. Its core must live in this process. It must not pin its
# threads, since hosts share the machine's cores.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """One model's trunk in vLLM; owns its link to the pool."""

    def __init__(
        self,
        config: TrunkConfig,
        connect: Callable[..., PoolLink] = PoolLink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if config.model.path is None:
            raise ClusterError(
                f"model {config.model.name!r}: vLLM reads a trunk only from a folder, and this "
                "model has none; use engine: transformers"
            )
        self._path = Path(config.model.path)
        self._config, self._connect = config, connect
        self._engine_config: EngineConfig = config.engine
        self._ids, self._arrivals = itertools.count(), itertools.count()
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._steps = 0
        self._clock = clock
        self._beat = clock()
        self._last_error: str | None = None
        self._parked = ParkedRequests(config.engine.park_s, self._check, clock)
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Build the trunk and start the loop. Raises UnsupportedModel and ClusterError."""
        path = self._path
        model_config = read_config(path)
        meta = meta_model(model_config)
        if not is_unmodified(meta):
            raise UnsupportedModel(
                f"engine: vllm does not serve models of type {meta.config.model_type!r}; use "
                "transformers"
            )
        layers = experts_layers(meta)
        os.environ.update(_ENVIRONMENT)
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        self._eos = end_of_text(model_config, generation_config(path), self._tokenizer)
        part = self._part_of_card(meta)
        self.streams = Streams(self._eos)
        self._requests = Requests(self.streams)
        numbers, forms = [layer.layer for layer in layers], forms_anywhere(layers)
        self._link = self._connect(self._config, numbers, forms=forms)
        router = self._link.router
        try:
            with in_pool(self._layer):
                self._llm = self._build(part)
            runner: Any = self._llm.model_executor.driver_worker.model_runner
            stateless = not self._llm.model_config.has_inner_state
            self._requests.watch(runner, router, may_repeat=stateless)
            self._warm_up()
        except BaseException:
            self._link.close()
            raise
        router.batch.owned_by(self._requests)
        model = self._llm.model_config
        self._limits = RequestLimits(
            max_prompt_tokens=model.max_model_len - 1,
            max_total_tokens=model.max_model_len,
            max_requests=self._engine_config.max_requests + self._engine_config.max_waiting,
            vocab_size=model.get_vocab_size(),
        )
        self._grammars = Grammars(self._tokenizer, self._limits.vocab_size, self._eos)
        self._thread = threading.Thread(target=self._run, name="vllm-loop", daemon=True)
        self._thread.start()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self._path)

    def _part_of_card(self, meta: PreTrainedModel) -> dict[str, float]:
        """Return vLLM's argument for what it may take of its GPU; empty: vLLM's default holds.

        vLLM wants that much to be free at its start, and hosts may be on the same GPU. Without a
        limit, it is what the trunk needs. Raises ClusterError.
        """
        config, device = self._config, pick_device(self._config.device)
        if device.type != "cuda":
            return {}
        sizes = describe_model(self._path, meta.config, meta, torch_dtype(config.model.dtype))
        weights = sizes.trunk_bytes + config.cache_bytes(sizes.cache_token_bytes)
        taken = take_for_trunk(device, config.share, weights)
        if taken is None:
            if self._engine_config.num_blocks is None:
                return {}  # the cache is what vLLM finds to be free
            taken = weights + CONTEXT_BYTES + LEAST_WORKSPACE_BYTES
        total = torch.cuda.get_device_properties(device).total_memory
        return {"gpu_memory_utilization": min(1.0, taken / total)}

    def _build(self, part: Mapping[str, float]) -> LLMEngine:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        config, sizes = self._config, self._engine_config
        blocks = sizes.num_blocks or 256
        tokens = blocks * sizes.page_size
        arguments = EngineArgs(
            model=str(self._path),
            dtype=config.model.dtype,
            # vLLM needs a tokenizer only for answers of a given form.
            skip_tokenizer_init=not (self._path / "tokenizer.json").exists(),
            # The same backend and whitespace as in `grammar.py`.
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
            # Compiled code calls the pool through a custom operator (`plugin.py`).
            enforce_eager=not sizes.compiled,
            max_num_seqs=sizes.max_requests,
            max_num_batched_tokens=max(sizes.max_batch_tokens, sizes.max_requests),
            max_model_len=_longest(self._path, tokens),
            # One more, since vLLM keeps a block for itself.
            num_gpu_blocks_override=None if sizes.num_blocks is None else blocks + 1,
            block_size=sizes.page_size,
            # vLLM checks the blocks against this budget; the number above alone sets the size.
            kv_cache_memory_bytes=None if sizes.num_blocks is None else 1 << 42,
            # Later prompts must not reuse blocks that were computed without some experts.
            enable_prefix_caching=False,
            async_scheduling=False,
            scheduling_policy="priority",
            disable_log_stats=True,
            generation_config="vllm",
            seed=0,
            **part,
        )
        return LLMEngine.from_engine_args(arguments)

    def _warm_up(self) -> None:
        """Generate a few tokens, so that vLLM compiles now what it compiles at first use."""
        for asked in (
            Sampling(max_tokens=2),
            Sampling(max_tokens=2, temperature=1.0, top_p=0.9, top_k=5, min_p=0.1, logprobs=1),
        ):
            self._llm.add_request("warm-up", {"prompt_token_ids": [0]}, parameters(asked, ()))
            while self._llm.has_unfinished_requests():
                self._llm.step()

    def _layer(self, layer: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        compute = self._link.router.experts(self._config.model.name, layer)

        def ask(x_TH: torch.Tensor, ids_TK: torch.Tensor, w_TK: torch.Tensor) -> torch.Tensor:
            # vLLM measures its memory with a batch of its own, for which the pool is not called.
            if not self._requests.in_forward:
                return torch.zeros_like(x_TH)
            return compute(x_TH, ids_TK, w_TK)

        return ask

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._asked.put(None)
        if self._thread is not None:
            self._thread.join(self._engine_config.close_timeout_s)
            self.streams.fail_all(EngineError("the engine was closed"))
            self._llm.engine_core.shutdown()
            self._link.close()

    # ---- requests -------------------------------------------------------------------------------

    @property
    def limits(self) -> RequestLimits:
        if self._thread is None:
            raise EngineError("the engine was not started")
        return self._limits

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        """Yield a request's tokens; see `Engine.generate`."""
        self.limits.check(prompt_ids, sampling)
        self._check()
        if sampling.form is not None:
            # vLLM would find a wrong form in a step, and the error would end all requests.
            await asyncio.to_thread(self._grammars.begin, sampling.form)
        requests = len(self.streams) + len(self._parked)
        if requests >= self.limits.max_requests:
            raise Busy(f"{requests} requests are running or waiting; try again later")

        arrival = next(self._arrivals)

        def attempt(tokens: list[int], left: int) -> AsyncGenerator[Delta, None]:
            asked = going_on(sampling, tokens[len(prompt_ids) :])
            return self._attempt(f"{request_id}#{next(self._ids)}", tokens, asked, arrival)

        trace = traced_request(request_id)
        parking = self._parked.generate(attempt, prompt_ids, sampling, already, trace)
        async with aclosing(parking) as deltas:
            async for delta in deltas:
                yield delta

    async def _attempt(
        self, key: str, tokens: list[int], sampling: Sampling, arrival: int
    ) -> AsyncGenerator[Delta, None]:
        """Yield tokens until the request ends, or lacks an expert."""
        self._check()
        stream = self.streams.open(key, RequestSampler(sampling, tokens), arrival)
        finished = False
        try:
            self._asked.put(lambda: self._add(key, tokens, sampling, arrival))
            while not finished:
                try:
                    delta = await stream.next(self._engine_config.stall_timeout_s)
                except TimeoutError:
                    self._raise_if_stalled()
                    continue
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self.streams.close(key)
            if not finished:
                self._asked.put(lambda: self._abort([key]))

    def _check(self) -> None:
        if not self._healthy:
            raise EngineError(f"the engine has ended: {self._last_error or 'it was closed'}")

    def _raise_if_stalled(self) -> None:
        """Raise EngineError if the loop stands still; waiting in its queue is no error."""
        stalled_s = self._clock() - self._beat
        if stalled_s >= self._engine_config.stall_timeout_s:
            raise EngineError(f"the engine made no step for {stalled_s:.0f} s")

    # ---- the loop -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            self._beat = self._clock()
            try:
                if not self._take_asked(wait=not self._llm.has_unfinished_requests()):
                    return
                if self._llm.has_unfinished_requests():
                    self._step()
            except Exception as error:
                # Any error ends the loop: all requests fail now, and Serve replaces the trunk.
                log.exception("a step of vLLM failed, so the engine ends")
                self._last_error = describe_error(error)
                self.streams.fail_all(EngineError(f"the engine failed: {self._last_error}"))
                return

    def _take_asked(self, *, wait: bool) -> bool:
        """Run the queued work; return False when the loop must end."""
        try:
            asked = self._asked.get(timeout=_IDLE_S) if wait else self._asked.get_nowait()
            while asked is not None:
                asked()
                asked = self._asked.get_nowait()
        except queue.Empty:
            return True
        return False

    def _add(self, key: str, prompt_ids: list[int], sampling: Sampling, arrival: int) -> None:
        try:
            asked = parameters(sampling, self._eos, self._grammars.text)
            # vLLM orders requests of one priority by arrival time, for which a counter suffices.
            theirs = self._llm.add_request(
                key,
                {"prompt_token_ids": prompt_ids},
                asked,
                arrival_time=float(arrival),
                priority=sampling.priority,
            )
        except (ValueError, TypeError) as error:
            self.streams.post({key: InternalError(f"vLLM refuses the request: {error}")})
            return
        self._requests.added(key, theirs)

    def _abort(self, keys: Sequence[str]) -> None:
        self._llm.abort_request(self._requests.ended(keys), internal=True)

    def _step(self) -> None:
        faults = self._requests.faults
        faults.clear()
        outputs = self._llm.step()
        self._steps += 1
        self.streams.post({**self._requests.deltas(outputs), **faults})
        if faults:
            self._abort(list(faults))

    # ---- statistics -----------------------------------------------------------------------------

    @property
    def _healthy(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._closed

    def stats(self) -> EngineStats:
        if self._thread is None:
            return EngineStats()
        scheduler: Any = self._llm.engine_core.engine_core.scheduler
        running, beat_s = len(scheduler.running), self._clock() - self._beat
        return EngineStats(
            running=running,
            waiting=max(0, len(self.streams) - running) + len(self._parked),
            parked=len(self._parked),
            last_error=self._last_error,
            steps=self._steps,
            heartbeat_age_s=beat_s,
            cache_free=1.0 - scheduler.kv_cache_manager.usage,
            healthy=self._healthy and beat_s < self._engine_config.stall_timeout_s,
        )


def _longest(path: Path, cached_tokens: int) -> int:
    """Return the tokens of one request: the model's positions, or fewer if the cache is smaller."""
    positions = getattr(read_config(path).get_text_config(), "max_position_embeddings", None)
    return cached_tokens if positions is None else min(cached_tokens, int(positions))
