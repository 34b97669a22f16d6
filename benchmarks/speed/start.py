"""How long a cluster takes to start, against importing what its processes import.

    python -m benchmarks.speed.start [--device cuda] [--model FOLDER] [--rounds N] [--json PATH]

A start is a new process that runs `moesaic.up` with two hosts, a trunk and the endpoint, and counts
until the endpoint has answered a request. The other side imports torch, transformers and Ray in a
new process. Both take turns; what they read is in the page cache after the first round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import write_json

HOSTS = 2
IMPORTS = "import torch, transformers, ray"
START = """
import json, sys
import moesaic
spec = json.loads(sys.argv[1])
with moesaic.up(spec) as cluster:
    with moesaic.Client(cluster.url) as client:
        client.complete("Once", max_tokens=1)
    print("answered", flush=True)
    sys.stdin.read()
"""
TIMEOUT_S = 600.0


def imports_s() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=TIMEOUT_S)
    return time.monotonic() - began


def start_s(spec: dict[str, Any]) -> float:
    """Start a cluster, and end it when it has answered."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", START, json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    took_s = None
    for line in process.stdout:
        if line.strip() == "answered":
            took_s = time.monotonic() - began
            break
    process.communicate(timeout=TIMEOUT_S)
    if took_s is None or process.returncode:
        raise RuntimeError(
            f"the cluster did not start: its process ended with {process.returncode}"
        )
    return took_s


def measure(device: str, model: str, rounds: int) -> dict[str, Any]:
    part = {"device": device, "num_gpus": 0.3 if device == "cuda" else 0}
    spec = {
        "name": "starting",
        "models": [{"name": "m", "path": model}],
        "hosts": [{"count": HOSTS, **part}],
        "trunk": part,
        "endpoint": {"port": 0},
    }
    times: dict[str, list[float]] = {"imports": [], "start": []}
    for _ in range(rounds):
        times["imports"].append(imports_s())
        times["start"].append(start_s(spec))
    ratios = [start / imports for imports, start in zip(*times.values(), strict=True)]
    return {
        "device": device,
        "model": model,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "rounds": times,
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.device, given.model, given.rounds)
    seconds = found["seconds"]
    print(
        f"imports {seconds['imports']:.1f} s, start {seconds['start']:.1f} s, "
        f"ratio {found['ratio']:.2f}"
    )
    write_json(given.json, {"title": "start", **found})


if __name__ == "__main__":
    main()
