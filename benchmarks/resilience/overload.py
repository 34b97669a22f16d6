"""Three times as many requests as the endpoint can answer: what is answered, refused and computed.

    python -m benchmarks.resilience.overload [--json PATH] [--model FOLDER]

First, as many clients as fill the engine ask one request after the other: that is the capacity.
Then requests arrive at random at `--times` that rate, whatever becomes of them, and no client asks
again. Work is what hosts computed, in rows for each token that somebody got; were overload
amplified, there would be more of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import write_json
from benchmarks.streams import prompts_of
from moesaic.handle import Cluster
from moesaic.models.source import resolve_model

MODEL = "m"
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Answered:
    status: int
    seconds: float
    tokens: int


class Endpoint:
    """Asks for texts over HTTP."""

    def __init__(self, http: httpx.AsyncClient, prompts: list[list[int]], tokens: int) -> None:
        self._http, self._prompts, self._tokens = http, prompts, tokens
        self._asked = 0

    async def ask(self) -> Answered:
        prompt = self._prompts[self._asked % len(self._prompts)]
        self._asked += 1
        body = {"model": MODEL, "prompt": prompt, "max_tokens": self._tokens, "temperature": 0}
        began = time.perf_counter()
        response = await self._http.post("/v1/completions", json=body)
        took_s = time.perf_counter() - began
        usage = response.json().get("usage") or {}
        return Answered(
            status=response.status_code,
            seconds=took_s,
            tokens=usage.get("completion_tokens", 0),
        )

    async def one_after_the_other(self, clients: int, seconds: float) -> list[Answered]:
        until, found = time.perf_counter() + seconds, []

        async def client() -> None:
            while time.perf_counter() < until:
                found.append(await self.ask())

        await asyncio.gather(*(client() for _ in range(clients)))
        return found

    async def arriving(self, per_s: float, seconds: float, seed: int) -> list[Answered]:
        rng = np.random.default_rng(seed)
        moments = np.cumsum(rng.exponential(1 / per_s, int(per_s * seconds)))
        began, tasks = time.perf_counter(), []
        for moment in moments.tolist():
            await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask()))
        return await asyncio.gather(*tasks)


def rows_computed(cluster: Cluster) -> int:
    return sum(process.rows for process in cluster.status().processes.values())


def figures(found: list[Answered], seconds: float, rows: int) -> dict[str, Any]:
    good = [one for one in found if one.status == 200]
    refused = [one.seconds for one in found if one.status == 429]
    tokens = sum(one.tokens for one in good)
    return {
        "asked_per_s": len(found) / seconds,
        "answered_per_s": len(good) / seconds,
        "statuses": dict(Counter(str(one.status) for one in found)),
        "answer_p50_s": float(np.quantile([one.seconds for one in good], 0.5)),
        "answer_p99_s": float(np.quantile([one.seconds for one in good], 0.99)),
        "refusal_p99_s": float(np.quantile(refused, 0.99)) if refused else None,
        "rows_per_token": rows / tokens,
    }


async def measure(cluster: Cluster, given: argparse.Namespace) -> dict[str, Any]:
    prompts = [list(prompt) for prompt in prompts_of(resolve_model(given.model))]
    limits = httpx.Limits(max_connections=None)
    found = {}
    async with httpx.AsyncClient(
        base_url=cluster.url or "", timeout=TIMEOUT_S, limits=limits
    ) as http:
        endpoint = Endpoint(http, prompts, given.tokens)
        await endpoint.one_after_the_other(given.requests, 2.0)
        per_s = 0.0
        for name in ("capacity", "overload"):
            rows, began = rows_computed(cluster), time.perf_counter()
            if name == "capacity":
                answers = await endpoint.one_after_the_other(2 * given.requests, given.seconds)
            else:
                answers = await endpoint.arriving(given.times * per_s, given.seconds, given.seed)
            took_s = time.perf_counter() - began
            found[name] = figures(answers, took_s, rows_computed(cluster) - rows)
            per_s = found[name]["answered_per_s"]
    capacity, overload = found["capacity"], found["overload"]
    return found | {
        "goodput": overload["answered_per_s"] / capacity["answered_per_s"],
        "amplification": overload["rows_per_token"] / capacity["rows_per_token"],
    }


def show(found: dict[str, Any], times: float) -> None:
    table = Table(title=f"{times:g} times the capacity")
    for column in ("", "asked/s", "answered/s", "p50", "p99", "refusals p99", "rows/token"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("capacity", "overload"):
        row = found[name]
        refusal = row["refusal_p99_s"]
        table.add_row(
            name,
            f"{row['asked_per_s']:.1f}",
            f"{row['answered_per_s']:.1f}",
            f"{row['answer_p50_s']:.2f} s",
            f"{row['answer_p99_s']:.2f} s",
            "" if refusal is None else f"{refusal * 1e3:.0f} ms",
            f"{row['rows_per_token']:.1f}",
        )
    Console(width=100).print(table)
    print(
        f"answered under overload / capacity: {found['goodput']:.2f}; work for each token: "
        f"{found['amplification']:.2f} times; statuses {found['overload']['statuses']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--requests", type=int, default=8, help="in a batch; twice that may wait")
    parser.add_argument("--tokens", type=int, default=32, help="of one text")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    spec = {
        "name": f"overload-{os.getpid()}",
        "models": [{"name": MODEL, "path": given.model, "dtype": "bfloat16"}],
        "hosts": [{"count": 2}],
        "network": {"lending": "never"},  # what is measured is what is sent
        "trunk": {"max_requests": given.requests, "max_waiting": 2 * given.requests},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "balance": {"auto": False},
    }
    with moesaic.up(spec) as cluster:
        found = asyncio.run(measure(cluster, given))
    show(found, given.times)
    write_json(given.json, {"title": "overload", **found})


if __name__ == "__main__":
    main()
