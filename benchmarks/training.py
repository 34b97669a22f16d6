"""A training step through the pool, against the same model whole in this process.

    python -m benchmarks.training [--json PATH] [--rounds 7] [--lending never always]

Every contender makes the same step of 4,096 tokens: forward, backward, clipping, AdamW. `eager` and
`grouped_mm` are transformers' own ways to compute experts, with torch's fused AdamW. The pool is a
cluster on Ray with two hosts of one thread each on the same cores; its trunk is in this process.
CPU seconds are those of all processes. `commit` is the part of a step after its backward pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import Comparison, report
from benchmarks.random_model import save_random_model
from moesaic.actors.runtime.embedded_ray import started_processes

VOCABULARY = 2048
MODEL = {
    "layers": 3,
    "experts": 8,
    "top_k": 2,
    "hidden": 512,
    "intermediate": 1024,
    "vocabulary": VOCABULARY,
    "heads": 8,
}
SEQUENCES, LENGTH = 8, 512
MAX_NORM = 1.0
TARGET_S, TARGET_CPU_S = 1.10, 1.05
TARGET_COMMIT = 0.10

Step = Callable[[], float]  # it returns the seconds of its backward pass's end to the step's end


def step_of(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Step:
    """Return a whole training step: forward, backward, clipping, update."""

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - learned

    return step


@contextmanager
def pool(folder: Path, lending: str, ids: torch.Tensor) -> Iterator[Step]:
    spec = {
        "name": f"bench-{lending}",
        "models": [{"name": "m", "path": str(folder), "dtype": "float32", "train": True}],
        "hosts": [{"count": 2, "threads": 1}],
        "network": {"lending": lending},
        "endpoint": None,
    }
    with moesaic.up(spec) as cluster:
        trunk = cluster.from_pretrained("m", train=True)
        with moesaic.PoolOptimizer(trunk, cluster, lr=1e-4) as optimizer:
            yield step_of(trunk, optimizer, ids)


def cpu_s() -> float:
    """CPU seconds of this process and of all that it has started."""
    total = 0.0
    for process in [psutil.Process(), *started_processes()]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def run(rounds: int, lendings: list[str]) -> list[Comparison]:
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    steps: dict[str, Step] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_random_model(folder, seed=0, **MODEL)
        for way in ("eager", "grouped_mm"):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation=way
            ).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            steps[way] = step_of(model, optimizer, ids)
        for lending in lendings:
            steps[f"pool, {lending}"] = stack.enter_context(pool(folder, lending, ids))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        used: dict[str, list[float]] = {name: [] for name in steps}
        commits: dict[str, list[float]] = {name: [] for name in steps}
        for warm in steps.values():
            warm()
        for _ in range(rounds):
            for name, step in steps.items():
                began, cpu = time.perf_counter(), cpu_s()
                commit_s = step()
                seconds[name].append(time.perf_counter() - began)
                used[name].append(cpu_s() - cpu)
                commits[name].append(commit_s)
    found = []
    for name in [name for name in steps if name.startswith("pool")]:
        found.append(_against_faster("seconds", name, seconds, TARGET_S))
        found.append(_against_faster("CPU seconds", name, used, TARGET_CPU_S))
        found.append(_part("commit", name, commits, seconds))
    return found


def _against_faster(
    what: str, name: str, found: dict[str, list[float]], target: float
) -> Comparison:
    peer = min(("eager", "grouped_mm"), key=lambda peer: statistics.median(found[peer]))
    ratios = [ours / base for ours, base in zip(found[name], found[peer], strict=True)]
    return Comparison(
        case=f"{what}, step of {SEQUENCES * LENGTH} tokens",
        ours=name,
        base=peer,
        seconds={one: statistics.median(found[one]) for one in (name, peer)},
        ratio=statistics.median(ratios),
        target=target,
    )


def _part(
    what: str, name: str, parts: dict[str, list[float]], wholes: dict[str, list[float]]
) -> Comparison:
    return Comparison(
        case=f"{what}, of the step",
        ours=f"{name}: {what}",
        base=name,
        seconds={
            f"{name}: {what}": statistics.median(parts[name]),
            name: statistics.median(wholes[name]),
        },
        ratio=statistics.median(
            part / whole for part, whole in zip(parts[name], wholes[name], strict=True)
        ),
        target=TARGET_COMMIT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lending", nargs="+", default=["never", "always"])
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    found = run(arguments.rounds, arguments.lending)
    report("A training step, float32", found, arguments.json)


if __name__ == "__main__":
    main()
