"""Memory of hosts that train, against the plan that is made before (docs/training.md).

    python -m benchmarks.training_memory [--json PATH] [--steps N] [--case NAME ...]

A cluster on Ray with two hosts trains a model with AdamW. Memory is what is resident (RSS), and its
peak within a step is the kernel's (VmHWM), so nothing is missed between two looks. What a host's
process has before the run begins, besides its weights, is not counted, nor is what the trunk's
process lets it read. `at rest` is between two steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import write_json
from benchmarks.random_model import save_random_model
from benchmarks.training import step_of
from moesaic.cluster.training.host_memory import BESIDES_TENSORS_BYTES, HostMemory

# 113 M parameters of experts; the trunk has 13 M.
VOCABULARY = 4096
MODEL = {
    "layers": 3,
    "experts": 8,
    "top_k": 2,
    "hidden": 768,
    "intermediate": 2048,
    "vocabulary": VOCABULARY,
    "heads": 12,
}
SEQUENCES, LENGTH = 4, 256
TARGET = 1.10
# How long hosts have to load weights, and to give the memory of a step back.
QUIET_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How a model is trained."""

    dtype: str = "float32"
    replicas: int = 1
    redundancy: int = 0
    lending: str = "never"


CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype="bfloat16"),
    "redundant": Case(dtype="bfloat16", replicas=2, redundancy=1),
    "lent": Case(lending="always"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFound:
    """Bytes of one host, with its weights: planned, and found."""

    host: str
    at_rest_planned: int
    at_rest: int
    peak_planned: int
    peak: int

    @property
    def at_rest_ratio(self) -> float:
        return self.at_rest / self.at_rest_planned

    @property
    def peak_ratio(self) -> float:
        return self.peak / self.peak_planned

    @property
    def met(self) -> bool:
        return max(self.at_rest_ratio, self.peak_ratio) <= TARGET


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return what a process has in memory, or with ``VmHWM`` the most since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {field}")


def borrowed_bytes(pid: int) -> int:
    """Return what a process has mapped of another one's gradients and touched."""
    found, lent = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024 if lent else 0
        elif "-" in line.split()[0]:  # the addresses of the next mapping
            lent = "memfd:moesaic:lent" in line
    return found


def forget_peak(pid: int) -> None:
    """Let the largest memory of a process be that of now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def measure(case: Case, steps: int) -> list[HostFound]:
    spec: dict[str, Any] = {
        "name": "bench-memory",
        "hosts": [{"count": 2, "threads": 1, "device": "cpu"}],
        "balance": {"redundancy": case.redundancy},
        "network": {"lending": case.lending},
        "endpoint": None,
    }
    model = {"name": "m", "dtype": case.dtype, "replicas": case.replicas, "train": True}
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), seed=0, **MODEL)
        with moesaic.up({**spec, "models": [{**model, "path": folder}]}) as cluster:
            trunk = cluster.from_pretrained("m", train=True)
            time.sleep(QUIET_S)
            pids = {name: process.pid for name, process in cluster.status().processes.items()}
            before = {name: resident_bytes(pid) for name, pid in pids.items()}
            with moesaic.PoolOptimizer(trunk, cluster, lr=1e-4) as optimizer:
                step = step_of(trunk, optimizer, ids)
                step()  # the optimizer's state is made here
                peaks, rests = dict.fromkeys(pids, 0), dict.fromkeys(pids, 0)
                for _ in range(steps):
                    time.sleep(QUIET_S)
                    for pid in pids.values():
                        forget_peak(pid)
                    step()
                    for name, pid in pids.items():
                        found = resident_bytes(pid, "VmHWM") - borrowed_bytes(pid)
                        peaks[name] = max(peaks[name], found)
                    time.sleep(QUIET_S)
                    for name, pid in pids.items():
                        rests[name] = max(rests[name], resident_bytes(pid) - borrowed_bytes(pid))
                run: Any = optimizer.run
                planned: Mapping[str, HostMemory] = run.lead.planned_memory(
                    lent=case.lending == "always"
                )
    return [
        HostFound(
            host=name,
            at_rest_planned=plan.at_rest + BESIDES_TENSORS_BYTES,
            at_rest=rests[name] - before[name] + plan.weights,
            peak_planned=plan.peak + BESIDES_TENSORS_BYTES,
            peak=peaks[name] - before[name] + plan.weights,
        )
        for name, plan in sorted(planned.items())
    ]


def show(found: Mapping[str, list[HostFound]]) -> None:
    table = Table(title=f"Memory of hosts that train with AdamW; target {TARGET:.2f} of the plan")
    table.add_column("case")
    table.add_column("host")
    for column in ("at rest: plan", "found", "ratio", "peak: plan", "found", "ratio"):
        table.add_column(column, justify="right")
    for case, hosts in found.items():
        for one in hosts:
            table.add_row(
                case,
                one.host,
                _mb(one.at_rest_planned),
                _mb(one.at_rest),
                _ratio(one.at_rest_ratio),
                _mb(one.peak_planned),
                _mb(one.peak),
                _ratio(one.peak_ratio),
            )
        table.add_section()
    Console().print(table)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def _ratio(value: float) -> str:
    return f"[{'green' if value <= TARGET else 'red'}]{value:.2f}[/]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    found = {name: measure(CASES[name], arguments.steps) for name in arguments.case}
    show(found)
    results = {
        name: [
            asdict(one)
            | {"at_rest_ratio": one.at_rest_ratio, "peak_ratio": one.peak_ratio, "met": one.met}
            for one in hosts
        ]
        for name, hosts in found.items()
    }
    write_json(arguments.json, {"target": TARGET, "cases": results})


if __name__ == "__main__":
    main()
