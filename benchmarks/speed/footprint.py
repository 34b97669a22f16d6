"""What a cluster costs at rest: memory by kind of process, with one trunk and with three, and CPU.

    python -m benchmarks.speed.footprint [--json PATH] [--lending never|auto|always] [--seconds N]

Memory is the kernel's proportional share (PSS), so that pages which several processes map count
once; a process's private memory is what would be free without it. Both are taken after requests
that reach every expert. CPU is that of the following seconds without requests. Ray itself takes
some in each of its processes: an actor and a Serve replica that do nothing run beside the cluster,
and what our processes take beyond theirs is our own.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import ray
from ray import serve
from rich.console import Console
from rich.table import Table

import moesaic
from benchmarks.measure import write_json
from benchmarks.streams import prompts_of
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.models.upcycling.demo import demo_model

TRUNKS = (1, 3)
# From the title of a process: Ray names workers after their actors.
KINDS = {
    "Trunk-": "trunk",
    ":Ingress": "ingress",
    "RayExpertHost": "host",
    "ray::Controller": "controller",
    "host.memory.memory_keeper": "memory keeper",
    "ray::Nothing": "empty actor",
    ":NoService": "empty replica",
}
# Ours, each with what it would be if it did nothing.
OURS = {
    "trunk": "empty replica",
    "ingress": "empty replica",
    "host": "empty actor",
    "controller": "empty actor",
    "memory keeper": None,
}
# All further ones, Serve's included.
RAYS = "Ray"


@ray.remote(num_cpus=0)
class Nothing:
    """An actor that does nothing."""

    def ready(self) -> bool:
        return True


@serve.deployment(ray_actor_options={"num_cpus": 0})
class NoService:
    """A Serve deployment that does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Of all processes of one kind in one cluster."""

    processes: int
    pss_mb: float
    private_mb: float  # of one process, on average
    cpu_percent: float  # of one core


def kind_of(process: psutil.Process) -> str:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        title = ""  # it has just ended, or is somebody else's
    return next((kind for part, kind in KINDS.items() if part in title), RAYS)


def memory(process: psutil.Process) -> tuple[float, float]:
    """PSS and private memory, in MB."""
    kb = defaultdict[str, float](float)
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        kb[name.rstrip(":")] += float(value)
    return kb["Pss"] / 1024, (kb["Private_Clean"] + kb["Private_Dirty"]) / 1024


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def processes() -> list[psutil.Process]:
    """Return those of the cluster of this process. Memory keepers belong to no Ray."""
    keepers = [one for one in psutil.process_iter() if kind_of(one) == "memory keeper"]
    return [*started_processes(), *keepers]


def footprints(seconds: float) -> dict[str, Footprint]:
    below = processes()
    kinds = {process: kind_of(process) for process in below}
    memories = {process: memory(process) for process in below}
    before = {process: cpu_s(process) for process in below}
    began = time.monotonic()
    time.sleep(seconds)
    took_s = time.monotonic() - began
    used = {process: cpu_s(process) - before[process] for process in below if process.is_running()}
    found = {}
    for kind in sorted(set(kinds.values())):
        mine = [process for process in below if kinds[process] == kind]
        found[kind] = Footprint(
            processes=len(mine),
            pss_mb=sum(memories[process][0] for process in mine),
            private_mb=sum(memories[process][1] for process in mine) / len(mine),
            cpu_percent=100 * sum(used.get(process, 0.0) for process in mine) / took_s,
        )
    return found


async def use_every_part(url: str, trunks: int) -> None:
    """Enough requests at once that each trunk has some, and that every expert is used."""
    prompts = prompts_of(demo_model())
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        for _ in range(2):
            await asyncio.gather(
                *(
                    client.completions.create(
                        model="demo", prompt=list(prompt), max_tokens=8, temperature=0
                    )
                    for prompt in prompts[: 8 * trunks]
                )
            )


def measure(trunks: int, lending: str, seconds: float) -> dict[str, Footprint]:
    spec: dict[str, Any] = {
        "name": "benchmark",
        "models": [{"name": "demo", "path": "demo", "dtype": "float32"}],
        "hosts": [{"count": 2}],
        "network": {"lending": lending},
        "trunk": {"min_replicas": trunks, "max_replicas": trunks},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
    }
    with moesaic.up(spec) as cluster:
        nothing: Any = Nothing.remote()
        ray.get(nothing.ready.remote())
        serve.run(NoService.bind(), name="nothing", route_prefix=None)
        asyncio.run(use_every_part(cluster.url or "", trunks))
        time.sleep(5.0)  # what follows the last request, such as reports
        return footprints(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lending", choices=("never", "auto", "always"), default="auto")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long CPU is counted")
    arguments = parser.parse_args()
    found = {n: measure(n, arguments.lending, arguments.seconds) for n in TRUNKS}
    show(found, arguments.lending)
    each = {
        str(trunks): {kind: asdict(one) for kind, one in kinds.items()}
        for trunks, kinds in found.items()
    }
    own = {str(trunks): own_cpu(kinds) for trunks, kinds in found.items()}
    write_json(arguments.json, {"lending": arguments.lending, "trunks": each, "own_cpu": own})


def own_cpu(kinds: Mapping[str, Footprint]) -> float:
    """Return what our processes take together beyond processes of Ray that do nothing."""
    total = 0.0
    for kind, empty in OURS.items():
        if kind in kinds:
            one = kinds[kind]
            total += one.cpu_percent
            total -= one.processes * kinds[empty].cpu_percent if empty else 0.0
    return total


def show(found: Mapping[int, Mapping[str, Footprint]], lending: str) -> None:
    table = Table(title=f"A cluster at rest, demo model, float32, lending {lending}")
    table.add_column("trunks", justify="right")
    table.add_column("process")
    for column in ("count", "PSS, all", "private, each", "CPU, all"):
        table.add_column(column, justify="right")
    for trunks, kinds in found.items():
        for kind, one in kinds.items():
            table.add_row(
                str(trunks),
                kind,
                str(one.processes),
                f"{one.pss_mb:,.0f} MB",
                f"{one.private_mb:,.0f} MB",
                f"{one.cpu_percent:.1f} %",
            )
        together = sum(one.cpu_percent for kind, one in kinds.items() if kind in OURS)
        table.add_section()
        table.add_row(str(trunks), "ours, together", "", "", "", f"{together:.1f} %")
        table.add_row(str(trunks), "beyond empty ones", "", "", "", f"{own_cpu(kinds):.1f} %")
        table.add_section()
    console = Console()
    console.print(table)
    few, many = (found[n] for n in TRUNKS)
    more_mb = sum(one.pss_mb for one in many.values()) - sum(one.pss_mb for one in few.values())
    private_mb = few["trunk"].private_mb
    console.print(
        f"Two more trunks take {more_mb:,.0f} MB, {more_mb / private_mb:.2f} of the private memory "
        "of one."
    )


if __name__ == "__main__":
    main()
