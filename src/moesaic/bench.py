"""A short load on an endpoint: requests at a given concurrency, and how long their tokens take."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from .clients.http_client import AsyncClient
from .clients.openai_wire import Options, only
from .proto.errors import MoesaicError, RequestError

# Every vocabulary has these ids, and in few of them are they special tokens.
_FIRST_ID, _LAST_ID = 32, 95
_LEAST_REQUESTS = 8
_EACH = 4  # requests per unit of concurrency


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Percentiles in seconds, by nearest rank; None if nothing was measured."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        ranked = sorted(seconds)

        def rank(part: float) -> float | None:
            return ranked[math.ceil(part * len(ranked)) - 1] if ranked else None

        return cls(p50=rank(0.5), p99=rank(0.99))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """The results of the requests at one concurrency."""

    concurrency: int
    requests: int  # that ended, with an answer or an error
    unfinished: int  # not sent or not ended within the time limit
    errors: dict[str, int]  # code of the error -> how many requests ended with it
    seconds: float  # from the first request to the last answer
    prompt_tokens: int  # of the answered requests, as counted by the endpoint
    answer_tokens: int
    answer_tokens_per_s: float
    time_to_first_token_s: Percentiles
    # Between two pieces of text: one token each, or the tokens that together make a character.
    inter_token_latency_s: Percentiles


@dataclass(slots=True)
class _Seen:
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    answer_tokens: int = 0


async def measure_load(
    url: str,
    *,
    model: str | None = None,
    concurrency: Sequence[int] = (1, 4, 16),
    requests: int | None = None,
    prompt_tokens: int = 32,
    answer_tokens: int = 32,
    seed: int = 0,
    limit_s: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LoadResult]:
    """Stream greedy completions of random prompts, once for each value of ``concurrency``.

    ``requests`` is the number per run (default: 4 x concurrency, at least 8). The prompts follow
    from ``seed`` alone. The model may end an answer before ``answer_tokens``. One request goes
    first and is not measured. A request that fails is counted by its error's code, and not sent
    again. ``limit_s`` is shared out evenly over the runs; a run that reaches its part of it stops,
    and tells how many requests did not end. Raises RequestError for impossible numbers,
    UnknownModel, and ClusterError if nothing answers at ``url``.
    """
    counts = {"concurrency": min(concurrency, default=0), "prompt_tokens": prompt_tokens}
    counts |= {"answer_tokens": answer_tokens, "requests": 1 if requests is None else requests}
    for name, count in counts.items():
        if count < 1:
            raise RequestError(f"{name}: {count} is below 1; give at least 1", param=name)
    ends = math.inf if limit_s is None else time.perf_counter() + limit_s
    draw = random.Random(seed)

    def prompt() -> list[int]:
        return [draw.randint(_FIRST_ID, _LAST_ID) for _ in range(prompt_tokens)]

    async with AsyncClient(url, retries=0) as client:
        chosen = model or only(await client.models())
        options: Options = {"model": chosen, "max_tokens": answer_tokens, "temperature": 0.0}
        await client.complete(prompt(), **options)
        found = []
        for index, many in enumerate(concurrency):
            left_s = (ends - time.perf_counter()) / (len(concurrency) - index)
            prompts = [prompt() for _ in range(requests or max(_LEAST_REQUESTS, _EACH * many))]
            found.append(await _measure(client, prompts, options, many, left_s, progress))
    return found


async def _measure(
    client: AsyncClient,
    prompts: list[list[int]],
    options: Options,
    many: int,
    limit_s: float,
    progress: Callable[[str, int, int], None] | None,
) -> LoadResult:
    seen, left, done = _Seen(), iter(prompts), 0
    began = time.perf_counter()

    async def ask() -> None:
        nonlocal done
        for prompt in left:
            await _ask(client, prompt, options, seen)
            done += 1
            if progress is not None:
                progress(f"{many} streams", done, len(prompts))

    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(None if limit_s == math.inf else max(limit_s, 0.0)),
            asyncio.TaskGroup() as group,
        ):
            for _ in range(many):
                group.create_task(ask())
    seconds = time.perf_counter() - began
    return LoadResult(
        concurrency=many,
        requests=done,
        unfinished=len(prompts) - done,
        errors=dict(sorted(seen.errors.items())),
        seconds=seconds,
        prompt_tokens=seen.prompt_tokens,
        answer_tokens=seen.answer_tokens,
        answer_tokens_per_s=seen.answer_tokens / seconds,
        time_to_first_token_s=Percentiles.of(seen.first_s),
        inter_token_latency_s=Percentiles.of(seen.between_s),
    )


async def _ask(client: AsyncClient, prompt: list[int], options: Options, seen: _Seen) -> None:
    last: float | None = None
    began = time.perf_counter()
    try:
        async with aclosing(client.stream_complete(prompt, **options)) as chunks:
            async for chunk in chunks:
                if chunk.usage is not None:
                    seen.prompt_tokens += chunk.usage.prompt_tokens
                    seen.answer_tokens += chunk.usage.completion_tokens
                if not chunk.text:
                    continue
                now = time.perf_counter()
                if last is None:
                    seen.first_s.append(now - began)
                else:
                    seen.between_s.append(now - last)
                last = now
    except MoesaicError as error:
        seen.errors[error.code] += 1
