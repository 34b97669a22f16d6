"""One request's trouble is no other's: faults of rows, exceptions in the model, NaN, stalls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from moesaic.actors.engine.engine import EngineConfig, Sampling
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.proto.errors import EngineError, ExpertUnavailable, InternalError
from tests.helpers.endpoint.engines import (
    continuous,
    deltas,
    reference,
    running,
    tokens,
    until_idle,
)
from tests.helpers.models.tiny import tiny_mixtral

BAD_TOKEN = 300  # a prompt token whose rows the faulty experts fail

Experts = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def eager(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """transformers' own reference implementation."""
    return type(module).forward.__wrapped__(module, x_TH, ids_TK, weights_TK)


@pytest.fixture
def experts() -> Iterator[Callable[[Experts], None]]:
    """Installs an experts function under the name that the models here are made with."""

    def install(function: Experts) -> None:
        ExpertsInterface.register("moesaic_faulty", function)

    install(eager)
    yield install
    del ALL_EXPERTS_FUNCTIONS._global_mapping["moesaic_faulty"]


class Probe:
    """A model whose experts act on the rows of a chosen request, as the router will."""

    def __init__(self) -> None:
        self.model = tiny_mixtral(experts_implementation="moesaic_faulty")
        self.engine: TransformersEngine | None = None
        self.rows: list[int] = []
        self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        flat = kwargs["input_ids"].flatten().tolist()
        self.rows = [row for row, token_id in enumerate(flat) if token_id == BAD_TOKEN]

    def zero_and_fail(
        self, module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        out_TH = eager(module, x_TH, ids_TK, weights_TK)
        if self.rows and self.engine is not None:
            out_TH[self.rows] = 0
            self.engine.fail_rows(self.rows, ExpertUnavailable("expert demo/0/3 has no replica"))
        return out_TH


async def test_rows_that_fail_end_their_request_and_no_other(
    experts: Callable[[Experts], None],
) -> None:
    probe = Probe()
    experts(probe.zero_and_fail)
    bad = [5, 6, BAD_TOKEN, 7]
    # Long enough to be prefilled in several steps, with the bad token in the last one.
    late = [*range(10, 60), BAD_TOKEN]
    good = [[5, 6, 7], [8], [*range(20, 80)]]
    expected = [reference(probe.model, prompt) for prompt in good]
    assert not any(BAD_TOKEN in answer for answer in expected)
    with running(probe.model) as engine:
        probe.engine = engine
        results = await asyncio.gather(
            *(tokens(engine, prompt) for prompt in (*good, bad, late)), return_exceptions=True
        )
        assert results[:3] == expected
        for result in results[3:]:
            assert isinstance(result, ExpertUnavailable)
            assert "demo/0/3" in str(result)
        await until_idle(engine)
        assert engine.stats().restarts == 0
        assert await tokens(engine, good[0]) == expected[0]


async def test_keys_and_values_of_failed_rows_are_never_shared(
    experts: Callable[[Experts], None],
) -> None:
    """Whole blocks of a prompt are kept for later prompts with the same beginning."""
    probe = Probe()
    experts(probe.zero_and_fail)
    prompt = [5, 6, BAD_TOKEN, *range(20, 45)]  # over three blocks of 8
    probe.engine = None
    expected = reference(probe.model, prompt)
    with running(probe.model) as engine:
        probe.engine = engine
        with pytest.raises(ExpertUnavailable):
            await tokens(engine, prompt)
        probe.engine = None  # the expert is back
        assert await tokens(engine, prompt) == expected


async def test_fail_rows_outside_of_a_step_is_a_defect() -> None:
    with (
        running(tiny_mixtral()) as engine,
        pytest.raises(InternalError, match="outside of a forward pass"),
    ):
        engine.fail_rows([0], EngineError("x"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logits_that_are_not_finite_end_only_their_request(temperature: float) -> None:
    model = tiny_mixtral()
    expected = reference(model, [5, 6, 7])

    def poison(module: Any, args: Any, logits: Tensor) -> None:
        if logits.shape[1] == 2:  # (1, requests, V): both are in this step
            logits[0, 1] = torch.nan

    model.lm_head.register_forward_hook(poison)
    hot = Sampling(max_tokens=8, temperature=temperature)
    with running(model) as engine:
        results = await asyncio.gather(
            tokens(engine, [5, 6, 7]), deltas(engine, [5], hot), return_exceptions=True
        )
        assert results[0] == expected
        assert isinstance(results[1], InternalError)
        assert "logits with NaN or infinite values" in str(results[1])
        assert engine.stats().restarts == 0


async def test_an_exception_in_the_model_ends_what_runs_and_the_engine_restarts(
    experts: Callable[[Experts], None],
) -> None:
    calls = 0

    def fail_once(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise RuntimeError("boom")
        return eager(module, x_TH, ids_TK, weights_TK)

    model = tiny_mixtral(experts_implementation="moesaic_faulty")
    expected = reference(model, [5, 6, 7])
    experts(fail_once)
    with running(model) as engine:
        thread = continuous(engine)._generation_thread
        results = await asyncio.gather(
            *(tokens(engine, [5, n], 40) for n in range(20)), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, EngineError)
            assert result.retryable
            assert "RuntimeError: boom" in str(result)
        async with asyncio.timeout(10):
            while not engine.stats().restarts or engine.stats().running:
                await asyncio.sleep(0.005)
        assert engine.stats().last_error == "RuntimeError: boom"
        assert engine.stats().healthy
        assert await tokens(engine, [5, 6, 7]) == expected
        assert continuous(engine)._generation_thread is thread
        assert thread is not None and thread.is_alive()


async def test_a_model_that_always_fails_is_reported_and_nobody_hangs(
    experts: Callable[[Experts], None],
) -> None:
    def fail(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        raise RuntimeError("always")

    experts(fail)
    with running(tiny_mixtral(experts_implementation="moesaic_faulty")) as engine:
        async with asyncio.timeout(30):
            while engine.stats().healthy:
                with pytest.raises(EngineError):
                    await tokens(engine, [5])
        assert "always" in str(engine.stats().last_error)
        before = threading.active_count()
        start = time.monotonic()
    # Also while it waits for its next try.
    assert time.monotonic() - start < 5
    assert threading.active_count() == before - 1


async def test_a_token_is_given_out_before_the_next_step_is_made(
    experts: Callable[[Experts], None],
) -> None:
    """No batching timer, no polling: a step may only begin when the last token has arrived."""
    may_step = threading.Semaphore(1)
    model = tiny_mixtral(experts_implementation="moesaic_faulty", layers=1)

    def gated(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assert may_step.acquire(timeout=30)
        return eager(module, x_TH, ids_TK, weights_TK)

    experts(gated)
    arrived = 0
    with running(model) as engine:
        async for delta in engine.generate("one", [5], Sampling(max_tokens=20)):
            assert len(delta.token_ids) == 1
            arrived += 1
            may_step.release()
    assert arrived == 20


async def test_a_step_that_stands_still_ends_its_requests(
    experts: Callable[[Experts], None],
) -> None:
    release = threading.Event()

    def stand(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        release.wait(30)
        return eager(module, x_TH, ids_TK, weights_TK)

    model = tiny_mixtral(experts_implementation="moesaic_faulty")
    expected = reference(model, [5, 6, 7])
    experts(stand)
    config = EngineConfig(page_size=8, num_blocks=64, stall_timeout_s=0.2, close_timeout_s=0.2)
    engine = TransformersEngine(model, config=config)
    engine.start()
    with pytest.raises(EngineError, match="made no step"):
        await tokens(engine, [5])
    assert engine.stats().healthy is False
    release.set()
    await until_idle(engine)
    assert await tokens(engine, [5, 6, 7]) == expected
    release.clear()
    stuck = asyncio.ensure_future(tokens(engine, [5]))
    async with asyncio.timeout(10):
        while not engine.stats().running:
            await asyncio.sleep(0.001)
    loop = continuous(engine)
    with pytest.raises(EngineError, match="did not stop within"):
        engine.close()
    with pytest.raises(EngineError):
        await stuck
    release.set()
    assert loop is not None and loop._generation_thread is not None
    loop._generation_thread.join(10)
    assert not loop.is_running()
