"""Many streams for a long time, of clients that are not all well-behaved: what is left behind?

    python -m benchmarks.resilience.soak [--json PATH] [--minutes 5] [--streams 64]

Every client asks again as soon as it has its answer. Most read to the end, and their texts are
compared with those from before; some leave in the middle or before the first token, some read
slowly, some send bodies that are none. At the end no request may be left in the engine, and no
process may have more threads or descriptors than after the first minute's traffic.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import moesaic
from benchmarks.measure import write_json
from benchmarks.streams import prompts_of
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.models.upcycling.demo import demo_model

NEW_TOKENS = 16
WARM_S = 30.0
REQUEST_S = 180.0  # a request that takes longer is stuck
QUIET_S = 30.0  # for what was cancelled to end
# How a client behaves, and how often.
KINDS = {"reads": 0.6, "leaves": 0.15, "leaves at once": 0.05, "reads slowly": 0.1, "babbles": 0.1}
BABBLE: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    b'{"model": "demo"}',
    b'{"model": "nobody", "prompt": "a"}',
    b'{"model": "demo", "prompt": [], "stream": true}',
    b'{"model": "demo", "prompt": [999999999], "stream": true}',
    b'{"model": "demo", "prompt": "a", "temperature": "hot"}',
    b'{"model": "demo", "prompt": "a", "max_tokens": 99999999}',
    b'{"model": "demo", "prompt": "a", "unknown": 1}',
)


@dataclass
class Seen:
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


class Client:
    """One of the streams."""

    def __init__(
        self, http: httpx.AsyncClient, prompts: list[list[int]], texts: list[str], seen: Seen
    ) -> None:
        self._http, self._prompts, self._texts, self._seen = http, prompts, texts, seen

    async def run(self, rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            try:
                async with asyncio.timeout(REQUEST_S):
                    outcome = await self._one(kind, rng)
            except TimeoutError:
                outcome = "stuck"
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self._seen.outcomes[f"{kind}: {outcome}"] += 1
            if outcome != "as it should":
                self._seen.wrong.append(f"{kind}: {outcome}")

    async def _one(self, kind: str, rng: random.Random) -> str:
        if kind == "babbles":
            answer = await self._http.post("/v1/completions", content=rng.choice(BABBLE))
            known = answer.status_code in (400, 404) and "error" in answer.json()
            return "as it should" if known else f"status {answer.status_code}"
        number = rng.randrange(len(self._prompts))
        leaves_after = {"leaves": rng.randrange(1, NEW_TOKENS), "leaves at once": 0}.get(kind)
        text, before = "", time.perf_counter()
        first = True
        async with self._http.stream(
            "POST", "/v1/completions", json=body(self._prompts[number])
        ) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}"
            if leaves_after == 0:
                return "as it should"
            pieces = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return "as it should" if text == self._texts[number] else "another text"
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return event["error"]["code"]
                text += event["choices"][0]["text"]
                now = time.perf_counter()
                if kind == "reads":
                    (self._seen.first_s if first else self._seen.gaps_s).append(now - before)
                before, first, pieces = now, False, pieces + 1
                if pieces == leaves_after:
                    return "as it should"
                if kind == "reads slowly":
                    await asyncio.sleep(0.3)
        return "ended without [DONE]"


def body(prompt: list[int]) -> dict[str, Any]:
    return {
        "model": "demo", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0,
        "stream": True,
    }  # fmt: skip


def resources() -> dict[str, dict[str, int]]:
    """Of each process of the cluster: descriptors, threads, bytes."""
    found = {}
    for process in started_processes():
        try:
            name = f"{process.pid} {(process.cmdline() or ['?'])[0].split('/')[-1][:40]}"
            found[name] = {
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
                "bytes": process.memory_info().rss,
            }
        except psutil.Error:
            continue  # it has ended meanwhile
    return found


async def texts_of(http: httpx.AsyncClient, prompts: list[list[int]]) -> list[str]:
    answers = await asyncio.gather(
        *(http.post("/v1/completions", json=body(p) | {"stream": False}) for p in prompts)
    )
    return [answer.json()["choices"][0]["text"] for answer in answers]


async def soak(
    url: str, monitoring: str, prompts: list[list[int]], streams: int, seconds: float
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=streams)
    timeout = httpx.Timeout(REQUEST_S)
    async with (
        httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as http,
        httpx.AsyncClient(base_url=monitoring, timeout=timeout) as operator,
    ):
        texts = await texts_of(http, prompts)

        async def phase(duration_s: float, seed: int) -> Seen:
            seen, until = Seen(), time.monotonic() + duration_s
            client = Client(http, prompts, texts, seen)
            await asyncio.gather(
                *(client.run(random.Random(1000 * seed + n), until) for n in range(streams))
            )
            return seen

        await phase(WARM_S, 1)
        await at_rest(operator)
        before = resources()
        began = time.monotonic()
        seen = await phase(seconds, 2)
        took_s = time.monotonic() - began
        rest = await at_rest(operator)
        after = resources()
        assert await texts_of(http, prompts) == texts
    grown = {
        name: {key: after[name][key] - count for key, count in found.items()}
        for name, found in before.items()
        if name in after
    }
    return {
        "seconds": took_s,
        "requests": sum(seen.outcomes.values()),
        "outcomes": dict(sorted(seen.outcomes.items())),
        "wrong": len(seen.wrong),
        "first token p50 s": float(np.percentile(seen.first_s, 50)),
        "first token p99 s": float(np.percentile(seen.first_s, 99)),
        "between tokens p50 s": float(np.percentile(seen.gaps_s, 50)),
        "between tokens p99 s": float(np.percentile(seen.gaps_s, 99)),
        "left in the engine": rest,
        "ended processes": sorted(set(before) - set(after)),
        "descriptors more": max(one["descriptors"] for one in grown.values()),
        "threads more": max(one["threads"] for one in grown.values()),
        "MB more": max(one["bytes"] for one in grown.values()) / 1e6,
        "grown": grown,
    }


async def at_rest(operator: httpx.AsyncClient) -> dict[str, Any]:
    """What the engine has left when no request runs any more."""
    until = time.monotonic() + QUIET_S
    while True:
        stats = (await operator.get("/status")).json()["engines"]["demo"]["work"]
        left = {key: stats[f"{key}_requests"] for key in ("running", "waiting", "parked")}
        if not any(left.values()) or time.monotonic() > until:
            return {**left, "restarts": stats["restarts"]}
        await asyncio.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    spec = {
        "name": f"soak{os.getpid()}",
        "models": [{"name": "demo", "path": "demo"}],
        "hosts": [{"count": 2, "threads": 1}],
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
    }
    prompts = prompts_of(demo_model())[:8]
    with moesaic.up(spec) as cluster:
        found = asyncio.run(
            soak(
                cluster.url or "",
                cluster.monitoring or "",
                prompts,
                args.streams,
                60 * args.minutes,
            )
        )
    table = Table(title=f"{args.streams} streams for {args.minutes:g} minutes", show_header=False)
    for key, value in found.items():
        if key not in ("grown", "outcomes"):
            table.add_row(key, f"{value:.3f}" if isinstance(value, float) else str(value))
    for outcome, count in found["outcomes"].items():
        table.add_row(outcome, str(count))
    Console().print(table)
    write_json(args.json, found)
    left = found["left in the engine"]
    sound = not (found["wrong"] or found["ended processes"] or any(left.values()))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
