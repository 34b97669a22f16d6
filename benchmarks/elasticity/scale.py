"""Two hosts become four and two again under load: errors, seconds of each phase, tokens/s.

    python -m benchmarks.elasticity.scale [--json PATH] [--model FOLDER]

Greedy streams through the engine in this process; hosts are real processes. Every text is compared
with the one of the same prompt from before. Hosts share the machine's cores: where there are fewer
cores than hosts, more hosts bring no more tokens, and the table shows that too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import write_json
from benchmarks.pools import engine_over
from benchmarks.streams import Load, gaps, longest, prompts_of, wrong_texts
from moesaic.handle import Cluster
from moesaic.models.source import resolve_model

MODEL = "m"
SCALE_S = 300.0


async def settled(cluster: Cluster) -> int:
    """Wait until nothing moves any more; gives how many hosts there are."""
    deadline = time.monotonic() + SCALE_S
    while True:
        status = await asyncio.to_thread(cluster.status)
        up = all(host.state == "up" for host in status.hosts)
        if up and not status.balancing.pending_moves:
            return len(status.hosts)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the pool is not settled after {SCALE_S:g} s: {status.hosts}")
        await asyncio.sleep(0.1)


async def measure(cluster: Cluster, load: Load, given: argparse.Namespace) -> dict[str, Any]:
    first = await asyncio.gather(*(load.ask(n, n) for n in range(given.streams)))
    wanted = {request.prompt: request.ids for request in first}
    load.requests.clear()
    load.start(given.streams)
    await asyncio.sleep(given.quiet)
    phases: list[tuple[str, int, float, float]] = []

    async def quiet(name: str) -> None:
        began = time.monotonic()
        hosts = await settled(cluster)
        await asyncio.sleep(given.quiet)
        phases.append((name, hosts, began, time.monotonic()))

    async def scale(name: str, count: int) -> None:
        began = time.monotonic()
        await asyncio.to_thread(cluster.scale, count)
        while await settled(cluster) != count:
            await asyncio.sleep(0.1)
        phases.append((name, count, began, time.monotonic()))

    await quiet("before")
    await scale("2 -> 4", 4)
    await quiet("with 4")
    await scale("4 -> 2", 2)
    await quiet("after")
    await load.stop()
    times = np.array([moment for request in load.requests for moment in request.times])
    found = gaps(load.requests)
    errors = [request.error for request in load.requests if request.error]
    return {
        "requests": len(load.requests),
        "failed": len(errors),
        "errors": sorted(set(errors))[:5],
        "wrong_texts": wrong_texts(load.requests, wanted),
        "phases": [
            {
                "phase": name,
                "hosts": hosts,
                "seconds": ended - began,
                "tokens_per_s": float(((times >= began) & (times < ended)).sum() / (ended - began)),
                "longest_gap_s": longest(found, began, ended),
            }
            for name, hosts, began, ended in phases
        ],
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title="Two hosts, four, and two again, under load")
    for column in ("phase", "seconds", "tokens/s", "per host", "longest gap"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in found["phases"]:
        table.add_row(
            row["phase"],
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / row['hosts']:.0f}",
            f"{row['longest_gap_s']:.3f} s",
        )
    Console(width=100).print(table)
    print(
        f"{found['requests']} requests, {found['failed']} failed, {found['wrong_texts']} with "
        "another text"
    )
    for error in found["errors"]:
        print(f"  {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of one text")
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds of a quiet phase")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = resolve_model(given.model)
    spec = {
        "name": f"scale-{os.getpid()}",
        "models": [{"name": MODEL, "path": str(folder), "dtype": "float32"}],
        "hosts": [{"count": 2, "min_count": 2, "max_count": 4}],
        "network": {"lending": "never"},  # what is measured is what is sent
        "endpoint": None,
        # By hand alone.
        "autoscale": {"up_after_s": 3600, "down_after_s": 3600},
        "balance": {"auto": False, "lease_s": 3},
    }
    with moesaic.up(spec) as cluster, engine_over(spec, streams=given.streams) as engine:
        load = Load(engine, prompts_of(folder)[: given.streams], given.tokens)
        found = asyncio.run(measure(cluster, load, given))
    show(found)
    write_json(given.json, {"title": "scale", **found})


if __name__ == "__main__":
    main()
