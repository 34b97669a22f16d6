"""An engine that does what its prompt says; for tests across processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from moesaic.actors.engine.engine import Delta, EngineStats, RequestLimits, Sampling
from moesaic.cluster.reports.status import ClusterStatus
from moesaic.proto.errors import ERRORS, EngineError, RequestError
from tests.helpers.cluster.reports import cluster_report, host_report

CODES = sorted(ERRORS)
# First token of a prompt: what to do. Above these: raise the error of that number in CODES.
COUNT, WAIT, DIE, DEFECT, SLOWLY = range(5)
# The variable that names the file of `GatedEngine`.
GATE = "MOESAIC_TEST_GATE"
# Of a token of SLOWLY.
SLOW_S = 0.5
ERROR, LATE_ERROR = 100, 200


def scripted_error(number: int) -> Exception:
    kind = ERRORS[CODES[number]]
    if issubclass(kind, RequestError):
        return kind(f"this is {kind.__name__}", param="prompt")
    return kind(f"this is {kind.__name__}")


class ScriptedEngine:
    """Meets ``Engine``."""

    limits = RequestLimits(
        max_prompt_tokens=300, max_total_tokens=400, max_requests=8, vocab_size=320
    )

    def __init__(self) -> None:
        self.running = 0
        self.steps = 0

    def start(self) -> None:
        pass

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        self.running += 1
        try:
            what = prompt_ids[0]
            if ERROR <= what < LATE_ERROR:
                raise scripted_error(what - ERROR)
            if what == DEFECT:
                raise KeyError("a defect")
            for n in range(sampling.max_tokens):
                if what == SLOWLY:
                    await asyncio.sleep(SLOW_S)
                self.steps += 1
                yield Delta((40 + n % 50,), "length" if n + 1 == sampling.max_tokens else None)
                if what == WAIT:
                    await asyncio.sleep(60)
                if what == DIE and n == 2:
                    await asyncio.sleep(0.5)  # so that the first tokens are on their way
                    os.kill(os.getpid(), signal.SIGKILL)
                if what >= LATE_ERROR and n == 2:
                    raise scripted_error(what - LATE_ERROR)
        finally:
            self.running -= 1

    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, steps=self.steps, healthy=True)

    def close(self) -> None:
        pass


class GatedEngine(ScriptedEngine):
    """Makes its first token once the file that `GATE` names is away."""

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        while self.steps == 0 and Path(os.environ[GATE]).exists():
            await asyncio.sleep(0.05)
        async for delta in super().generate(request_id, prompt_ids, sampling, already):
            yield delta


class BrokenEngine(ScriptedEngine):
    """Starts, and makes no token."""

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        raise EngineError("its forward pass is broken")
        yield


def scripted_engine() -> ScriptedEngine:
    return ScriptedEngine()


def gated_engine() -> ScriptedEngine:
    return GatedEngine()


def broken_engine() -> ScriptedEngine:
    return BrokenEngine()


async def cluster_status() -> ClusterStatus:
    """What the pool would add to ``/status``."""
    return cluster_report(hosts=[host_report("h0")])
