"""Hosts killed, frozen and slowed under load: failed requests, changed texts, gaps between tokens.

    python -m benchmarks.resilience.faults [--json PATH] [--rounds N] [--model FOLDER]
    python -m benchmarks.resilience.faults --lending always --kinds kill --rounds 30

The demo model in float32, every expert with a replica on another host, 16 streams of greedy texts
through the engine in this process; hosts are real processes. With lending each expert has one
replica, because a host's memory outlives it. Each round waits until the pool is
whole, chooses a host and a harm at random (seeded), and measures until the pool is whole again.
Every text is compared with the one of the same prompt from before the first fault. A gap is the
time between two tokens of one stream; gaps of quiet times are shown beside those around faults.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from benchmarks.streams import Load, Request, gaps, longest, prompts_of, wrong_texts
from moesaic.actors.engine.engine import Engine
from moesaic.handle import Cluster
from moesaic.models.source import resolve_model

MODEL = "m"
KINDS = ("kill", "freeze", "slow")
WHOLE_S = 300.0
# A slow host works for a tenth of the time.
STOPPED_S, WORKING_S = 0.09, 0.01
# Of a kill's timeline: its pieces, and what is shown before and behind it.
PIECE_S = 0.5
MARGIN_S = 8.0


@dataclass(frozen=True, kw_only=True)
class Round:
    kind: str
    host: str
    began: float  # of the harm
    ended: float  # of the harm itself,
    whole: float  # and of what it left behind


# ---- harm ---------------------------------------------------------------------------------------


async def whole(cluster: Cluster, unprotected: int) -> dict[str, int]:
    """Wait until every host is up and every expert as protected as it can be; gives each host's
    process. ``unprotected`` is how many experts have one replica in a pool that is whole."""
    deadline = time.monotonic() + WHOLE_S
    while True:
        status = await asyncio.to_thread(cluster.status)
        up = all(host.state == "up" for host in status.hosts)
        protected = status.unprotected_experts <= unprotected and not status.missing_experts
        if up and protected and not status.balancing.pending_moves:
            return {name: process.pid for name, process in status.processes.items()}
        if time.monotonic() > deadline:
            raise RuntimeError(f"the pool is not whole after {WHOLE_S:g} s: {status.hosts}")
        await asyncio.sleep(0.1)


async def harm(cluster: Cluster, kind: str, host: str, seconds: float, unprotected: int) -> Round:
    processes = await whole(cluster, unprotected)
    pid, began = processes[host], time.monotonic()
    if kind == "kill":
        os.kill(pid, signal.SIGKILL)
    else:
        try:
            await _stop_and_go(pid, began + seconds, *_RHYTHMS[kind])
        finally:
            os.kill(pid, signal.SIGCONT)
    ended = time.monotonic()
    while kind == "kill" and (await whole(cluster, unprotected))[host] == pid:
        await asyncio.sleep(0.1)  # the dead process's last report still looks whole
    await whole(cluster, unprotected)
    return Round(kind=kind, host=host, began=began, ended=ended, whole=time.monotonic())


# Seconds stopped and at work, in turns.
_RHYTHMS = {"freeze": (float("inf"), 0.0), "slow": (STOPPED_S, WORKING_S)}


async def _stop_and_go(pid: int, until: float, stopped_s: float, working_s: float) -> None:
    while (left_s := until - time.monotonic()) > 0:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(min(stopped_s, left_s))
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(working_s)


# ---- figures ------------------------------------------------------------------------------------


def quiet_gaps(found: np.ndarray, rounds: Sequence[Round]) -> np.ndarray:
    """Lengths of the gaps that touch no round."""
    quiet = np.ones(len(found), dtype=bool)
    for one in rounds:
        quiet &= (found[:, 1] <= one.began) | (found[:, 0] >= one.whole)
    return found[quiet, 1] - found[quiet, 0]


def timeline(found: np.ndarray, began: float, ended: float) -> dict[str, Any]:
    """The longest gap that touches each piece of an interval and of what is around it; seconds
    count from its beginning."""
    edges = np.arange(began - MARGIN_S, ended + MARGIN_S, PIECE_S)
    return {
        "piece_s": PIECE_S,
        "from_s": -MARGIN_S,
        "ended_s": ended - began,
        "longest_gap_s": [round(longest(found, edge, edge + PIECE_S), 3) for edge in edges],
    }


async def measure(cluster: Cluster, engine: Engine, given: argparse.Namespace) -> dict:
    prompts = prompts_of(resolve_model(given.model))[: given.streams]
    load = Load(engine, prompts, given.tokens)
    first = await asyncio.gather(*(load.ask(n, n) for n in range(len(prompts))))
    failed = [request.error for request in first if request.error]
    if failed:
        raise RuntimeError(f"requests failed before any fault: {failed[0]}")
    wanted = {request.prompt: request.ids for request in first}
    load.requests.clear()
    load.start(given.streams)
    rng = np.random.default_rng(given.seed)
    chosen = given.kinds.split(",")
    kinds = rng.permutation([chosen[n % len(chosen)] for n in range(given.rounds)]).tolist()
    rounds: list[Round] = []
    await asyncio.sleep(given.pause)
    unprotected = (await asyncio.to_thread(cluster.status)).unprotected_experts
    unprotected = 0 if given.lending == "never" else unprotected
    for number, kind in enumerate(kinds):
        hosts = sorted(await whole(cluster, unprotected))
        await asyncio.sleep(given.pause)
        host = str(rng.choice(hosts))
        rounds.append(await harm(cluster, kind, host, given.harm, unprotected))
        took_s = rounds[-1].whole - rounds[-1].began
        print(f"round {number + 1}: {kind} {rounds[-1].host}, whole after {took_s:.1f} s")
    await asyncio.sleep(max(given.pause, MARGIN_S))
    await load.stop()
    return summary(load.requests, wanted, rounds)


def summary(
    requests: Sequence[Request], wanted: dict[int, list[int]], rounds: Sequence[Round]
) -> dict[str, Any]:
    found = gaps(requests)
    quiet_s = quiet_gaps(found, rounds)
    per_kind: dict[str, list[float]] = defaultdict(list)
    for one in rounds:
        per_kind[one.kind].append(longest(found, one.began, one.whole))
    quiet_max = float(quiet_s.max(initial=0.0))
    kills = [one for one in rounds if one.kind == "kill"]
    worst = max(kills, key=lambda one: longest(found, one.began, one.whole), default=None)
    errors = [request.error for request in requests if request.error]
    return {
        "requests": len(requests),
        "failed": len(errors),
        "errors": sorted(set(errors))[:5],
        "wrong_texts": wrong_texts(requests, wanted),
        "tokens": sum(len(request.ids) for request in requests),
        "quiet": {
            "gaps": len(quiet_s),
            "p50_s": float(np.quantile(quiet_s, 0.5)) if quiet_s.size else None,
            "p99_s": float(np.quantile(quiet_s, 0.99)) if quiet_s.size else None,
            "longest_s": quiet_max,
        },
        "kinds": {
            kind: {
                "rounds": len(longest_s),
                "longest_s": max(longest_s),
                "median_longest_s": float(np.median(longest_s)),
                "beyond_quiet_s": max(0.0, max(longest_s) - quiet_max),
            }
            for kind, longest_s in per_kind.items()
        },
        "rounds": [asdict(one) for one in rounds],
        "worst_kill": worst and timeline(found, worst.began, worst.whole),
    }


def show(found: dict[str, Any]) -> None:
    quiet = found["quiet"]
    table = Table(title="Longest gaps between two tokens of a stream")
    for column in ("", "rounds", "longest", "median of rounds", "beyond quiet"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("quiet", "", f"{quiet['longest_s']:.3f} s", f"p50 {quiet['p50_s']:.3f} s", "")
    for kind, row in found["kinds"].items():
        table.add_row(
            kind,
            str(row["rounds"]),
            f"{row['longest_s']:.3f} s",
            f"{row['median_longest_s']:.3f} s",
            f"{row['beyond_quiet_s']:.3f} s",
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
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of harm, with commas")
    parser.add_argument("--lending", choices=("never", "always"), default="never")
    parser.add_argument("--device", default="cpu", help="of hosts and trunk, which share it")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of one text")
    parser.add_argument("--harm", type=float, default=5.0, help="seconds frozen or slow")
    parser.add_argument("--pause", type=float, default=3.0, help="quiet seconds before each round")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    gpus = 0 if given.device == "cpu" else 0.6 / given.hosts
    spec = {
        "name": f"faults-{os.getpid()}",
        "models": [{"name": MODEL, "path": given.model, "dtype": "float32"}],
        "hosts": [{"count": given.hosts, "device": given.device, "num_gpus": gpus}],
        "trunk": {"device": given.device},
        "endpoint": None,
        "network": {"lending": given.lending},
        "balance": {"auto": False, "redundancy": int(given.lending == "never")},
    }
    with moesaic.up(spec) as cluster, engine_over(spec, streams=given.streams) as engine:
        found = asyncio.run(measure(cluster, engine, given))
    show(found)
    write_json(given.json, {"title": "faults", "setting": vars(given), **found})


if __name__ == "__main__":
    main()
