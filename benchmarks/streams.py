"""Streams of texts from an engine, as several benchmarks ask for them, and what they show."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from moesaic.actors.engine.engine import Engine, Sampling
from moesaic.proto.errors import MoesaicError

PROMPT_TOKENS, PROMPTS = 32, 32


def prompts_of(folder: Path) -> list[list[int]]:
    """Prompts of code, the same at each run."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("a*.py")))
    ids = tokenizer(text[:40_000]).input_ids
    return [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(PROMPTS)]


@dataclass
class Request:
    stream: int
    prompt: int
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each delta of tokens
    error: str = ""


class Load:
    """Streams that ask for one text after the other until they are told to stop."""

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self._engine, self._prompts, self._tokens = engine, prompts, tokens
        self.requests: list[Request] = []
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def ask(self, stream: int, prompt: int) -> Request:
        request = Request(stream, prompt)
        self.requests.append(request)
        sampling = Sampling(max_tokens=self._tokens)
        try:
            async for delta in self._engine.generate("r", self._prompts[prompt], sampling):
                request.ids += delta.token_ids
                request.times.append(time.monotonic())
        except MoesaicError as error:
            request.error = f"{type(error).__name__}: {error}"
        return request

    def start(self, streams: int) -> None:
        self._tasks = [asyncio.create_task(self._run(stream)) for stream in range(streams)]

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _run(self, stream: int) -> None:
        turn = stream
        while not self._stop.is_set():
            await self.ask(stream, turn % len(self._prompts))
            turn += 1


def gaps(requests: Sequence[Request]) -> np.ndarray:
    """(gaps, 2): when each began and ended."""
    pairs = [
        (before, after)
        for request in requests
        for before, after in zip(request.times, request.times[1:], strict=False)
    ]
    return np.array(pairs).reshape(-1, 2)


def longest(found: np.ndarray, began: float, ended: float) -> float:
    """The longest gap that touches an interval."""
    touching = found[(found[:, 1] > began) & (found[:, 0] < ended)]
    return float((touching[:, 1] - touching[:, 0]).max(initial=0.0))


def wrong_texts(requests: Sequence[Request], wanted: dict[int, list[int]]) -> int:
    """Texts that differ from what they have to be; those of failed requests as far as they go."""
    return sum(request.ids != wanted[request.prompt][: len(request.ids)] for request in requests)
