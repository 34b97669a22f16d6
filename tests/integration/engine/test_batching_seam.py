"""What we rely on inside transformers' continuous batching; when this fails, read batching.py."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from transformers import MixtralForCausalLM
from transformers.generation.continuous_batching import continuous_api, model_runner, requests
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.scheduler import FIFOScheduler, Scheduler

from moesaic.actors.engine.engine import EngineConfig, Sampling
from moesaic.actors.engine.transformers_backend.continuous_batching import BatchingLoop
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from tests.helpers.endpoint.engines import continuous
from tests.helpers.models.tiny import tiny_mixtral


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (ContinuousBatchingManager, "_create_batch_processor", ["self"]),
        (ContinuousBatchingManager, "_run_generation_loop", ["self"]),
        (ContinuousBatchingManager, "_generation_step", ["self"]),
        (
            ContinuousBatchingManager,
            "_generation_loop_body",
            ["self", "batch_processor", "bootstrapping"],
        ),
        (ContinuousBatchingManager, "cancel_request", ["self", "request_id"]),
        (continuous_api.OutputRouter, "deliver", ["self", "output"]),
        (continuous_api.OutputRouter, "deliver_batch", ["self", "outputs"]),
        (continuous_api.BackgroundThreadStatus, "request_stop", ["self", "status", "global_rank"]),
        (continuous_api.BackgroundThreadStatus, "clear", ["self"]),
        (model_runner.ModelRunner, "_sample", ["self", "scores", "output_ids"]),
        (model_runner, "infer_max_single_request_tokens", ["cache"]),
        (Scheduler, "set_request_cancellation", ["self", "request_id"]),
        (Scheduler, "clear_cancelled_requests", ["self"]),
        (
            requests.FutureRequestState,
            "__init__",
            ["self", "state", "has_new_token", "complete_blocks", "query_length"],
        ),
    ],
)
def test_signature(owner: Any, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_attributes() -> None:
    loop = TransformersEngine(tiny_mixtral(), config=EngineConfig(num_blocks=8))
    loop.start()
    try:
        manager = loop._loop
        assert isinstance(manager, BatchingLoop)
        processor = manager.batch_processor
        assert processor is not None
        assert isinstance(processor.scheduler, FIFOScheduler)
        assert processor.scheduler.block_new_requests is False
        assert processor.scheduler.active_requests == {}
        assert processor.inputs_and_outputs.requests_in_batch == []  # pyright: ignore[reportAttributeAccessIssue]
        assert processor.model_runner._sample == manager._sample
        assert processor.output_router is manager.output_router
        assert processor.use_async_batching is False
        assert processor.cb_config.use_cuda_graph == (False, False)
        assert processor.cache.compute_free_capacity() == 1.0
        assert manager.background_thread_status.fatal_error is None
        assert callable(processor.cache.reset)
    finally:
        loop.close()


async def test_the_order_of_calls_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls.append(name)
            return result

        monkeypatch.setattr(owner, name, noted)

    model = tiny_mixtral()
    model.register_forward_hook(lambda *_: calls.append("forward"))
    for method in ("prepare_next_batch", "_generation_step", "update_batch"):
        note(ContinuousBatchProcessor, method)
    note(BatchingLoop, "_sample")
    engine = TransformersEngine(model)
    engine.start()
    router = continuous(engine).output_router
    note(router, "deliver_batch")
    try:
        async for _ in engine.generate("a", [5, 6], Sampling(max_tokens=1)):
            pass
    finally:
        engine.close()
    start = calls.index("forward") - 1
    assert calls[start : start + 6] == [
        "prepare_next_batch",
        "forward",
        "_sample",
        "_generation_step",
        "deliver_batch",
        "update_batch",
    ]


async def test_rows_are_in_the_order_of_the_requests() -> None:
    """The flat batch is the requests' tokens one after the other: what fail_rows relies on."""
    seen: list[tuple[list[int], list[tuple[str, int]]]] = []
    model = tiny_mixtral()
    engine = TransformersEngine(model)
    engine.start()
    loop = continuous(engine)

    def look(module: MixtralForCausalLM, args: Any, kwargs: dict[str, Any]) -> None:
        rows = [(r.state.request_id, r.query_length) for r in loop._requests_in_batch()]
        seen.append((kwargs["input_ids"][0].tolist(), rows))

    model.register_forward_pre_hook(look, with_kwargs=True)
    prompts = {"a": [5, 6, 7], "b": [8], "c": [9, 10]}
    try:
        with loop.pause():  # so that all three are in the first batch
            streams = [
                anext(engine.generate(name, ids, Sampling(max_tokens=1)))
                for name, ids in prompts.items()
            ]
            tasks = [asyncio.ensure_future(stream) for stream in streams]
            await asyncio.sleep(0)  # each task submits its request at its first step
        await asyncio.gather(*tasks)
    finally:
        engine.close()
    tokens, rows = seen[0]
    assert [(name.split("#")[0], length) for name, length in rows] == [("a", 3), ("b", 1), ("c", 2)]
    assert tokens == [5, 6, 7, 8, 9, 10]
