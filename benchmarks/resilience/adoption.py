"""A killed host's next process: taking its experts over against loading them from the disk.

    python -m benchmarks.resilience.adoption [--json PATH] [--rounds N] [--gigabytes N]

A model with random weights, all of it on one host, which is a process that is killed. Both ways end
when the host serves every expert. The time counts from the start of the host in its process, where
Ray's actor begins; what Python needs for its imports before is shown beside it. The checkpoint is
in the page cache, so a real disk is slower than the figure says.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import write_json
from benchmarks.random_model import save_random_model
from moesaic.actors.host.host import ExpertHost
from moesaic.actors.host.memory.kept_memory import KeptMemory
from moesaic.cluster.expert_keys import first_versions
from moesaic.cluster.placement import ModelRef, ModelShape, every_expert

KEEP_S = 120.0
LAYERS, EXPERTS, HIDDEN = 4, 8, 1024


def run_host(folder: str, address: str, parent: str) -> None:
    """Be a host that serves everything; print how long that took, and wait to be killed."""
    gc.freeze()  # as after the imports of the actor (`import_at_low_priority`)
    began = time.monotonic()
    kept = KeptMemory(address, "host", keep_s=KEEP_S, parent_pid=int(parent))
    host = ExpertHost("host", node="here", device="cpu", lends=True, kept=kept)
    shape = ModelShape(model="m", experts=dict.fromkeys(range(LAYERS), EXPERTS))
    ref = ModelRef(name="m", dtype="float32", path=folder)
    host.load([(ref, shape)], first_versions(every_expert([shape])))
    took_s = time.monotonic() - began
    report = host.report()
    found = {"took_s": took_s, "adopted": report.adopted, "bytes": report.weight_bytes}
    print(json.dumps(found), flush=True)
    sys.stdin.read()


def measure(folder: str, address: str) -> dict[str, float]:
    """Run a host until it serves, and kill it."""
    began = time.monotonic()
    command = [sys.executable, "-m", __spec__.name, "--host", folder, address, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        found = json.loads(child.stdout.readline())
        found["with_imports_s"] = time.monotonic() - began
        child.kill()
    return found


def compare(folder: Path, rounds: int) -> list[dict[str, float]]:
    found = []
    for number in range(rounds):
        address = f"moesaic-benchmark-{os.getpid()}-{number}"
        load = measure(str(folder), address)
        adopt = measure(str(folder), address)
        if load["adopted"] or adopt["adopted"] != LAYERS * EXPERTS:
            raise RuntimeError(f"not what was to be measured: {load}, {adopt}")
        found.append(
            {
                "bytes": adopt["bytes"],
                "load_s": load["took_s"],
                "adopt_s": adopt["took_s"],
                "ratio": adopt["took_s"] / load["took_s"],
                "load_with_imports_s": load["with_imports_s"],
                "adopt_with_imports_s": adopt["with_imports_s"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--host", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.host is not None:
        run_host(*given.host)
        return
    with tempfile.TemporaryDirectory() as folder:
        values = given.gigabytes * 1e9 / 4  # of all experts, in float32
        save_random_model(
            Path(folder),
            layers=LAYERS,
            experts=EXPERTS,
            top_k=2,
            hidden=HIDDEN,
            intermediate=int(values / (LAYERS * EXPERTS * 3 * HIDDEN)) // 16 * 16,
        )
        found = compare(Path(folder), given.rounds)
    table = Table(title="From the start of a killed host's next process until it serves all")
    for column in ("", "from the disk", "taken over", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for title, load, adopt in (
        ("host", "load_s", "adopt_s"),
        ("with Python's imports", "load_with_imports_s", "adopt_with_imports_s"),
    ):
        table.add_row(
            title,
            f"{statistics.median(one[load] for one in found):.2f} s",
            f"{statistics.median(one[adopt] for one in found):.2f} s",
            f"{statistics.median(one[adopt] / one[load] for one in found):.3f}",
        )
    Console(width=100).print(table)
    print(f"{found[0]['bytes'] / 1e9:.2f} GB, medians of {len(found)} rounds")
    write_json(given.json, {"title": "adoption", "rounds": found})


if __name__ == "__main__":
    main()
