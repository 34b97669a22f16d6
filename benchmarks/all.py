"""Every benchmark, one after the other: tables on the screen, JSON in benchmarks/results.

python -m benchmarks.all [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import RESULTS

# Folder, name and options of each. The part of a name after a "-" is a variant of a benchmark.
GROUPS: dict[str, dict[str, list[str]]] = {
    "planning": {
        "planner": [],
        "planner-growth": ["--growth"],
        "recorded": [],
        "levelling": [],
    },
    "speed": {
        "transport": [],
        "bulk": [],
        "layer": [],
        "decode": [],
        "decode-float32": ["--dtype", "float32"],
        "endpoint": [],
        "footprint": [],
        "training_workers": [],
        "training_checkpoints": [],
    },
    "elasticity": {
        "simulation": [],
        "skew": [],
        "scale": [],
        "training_replicas": [],
    },
    "resilience": {
        "faults": [],
        "faults-lending": ["--lending", "always", "--kinds", "kill", "--rounds", "30"],
        "adoption": [],
        "faults_throughput": [],
        "overload": [],
        "strangers": [],
        "soak": [],
        "training_kills": [],
    },
}
BENCHMARKS = {
    name: (f"benchmarks.{group}.{name.partition('-')[0]}", options)
    for group, benchmarks in GROUPS.items()
    for name, options in benchmarks.items()
}


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"{', '.join(unknown)}: none of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or BENCHMARKS:
        module, options = BENCHMARKS[name]
        command = [sys.executable, "-m", module, "--json", str(RESULTS / f"{name}.json")]
        failed += subprocess.run([*command, *options], check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
