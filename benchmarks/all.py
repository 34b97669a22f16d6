"""Every benchmark, one after the other: tables on the screen, JSON in benchmarks/results.

python -m benchmarks.all [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS: dict[str, list[str]] = {
    "planner": [],
    "planner-growth": ["--growth"],
    "recorded": [],
    "levelling": [],
    "simulation": [],
    "transport": [],
    "layer": [],
    "decode": [],
    "decode-float32": ["--dtype", "float32"],
    "endpoint": [],
    "skew": [],
    "faults": [],
    "faults_throughput": [],
    "scale": [],
    "overload": [],
    "strangers": [],
    "soak": [],
}


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"{', '.join(unknown)}: none of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    results = Path(__file__).parent / "results"
    failed = 0
    for name in names or BENCHMARKS:
        module = f"benchmarks.{name.split('-')[0]}"
        command = [sys.executable, "-m", module, "--json", str(results / f"{name}.json")]
        failed += subprocess.run([*command, *BENCHMARKS[name]], check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
