"""The pictures of docs/elasticity.md that show a running pool, from the results of benchmarks.

    python -m benchmarks.pictures

`benchmarks.simulation` draws its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.svg import line_chart

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
# Buckets that are averaged: streams of one batch get their tokens at the same moment.
SMOOTH = 40


def smoothed(values: list[float]) -> list[float]:
    whole = len(values) - len(values) % SMOOTH
    return [sum(values[i : i + SMOOTH]) / SMOOTH for i in range(0, whole, SMOOTH)]


def draw(path: Path, title: str, timeline: dict[str, Any]) -> None:
    rates = smoothed(timeline["tokens_per_s"])
    step_s = timeline["bucket_s"] * SMOOTH
    line_chart(
        path,
        title=title,
        x_label="seconds since it began",
        y_label="tokens/s of all streams",
        x=[timeline["from_s"] + step_s * (n + 0.5) for n in range(len(rates))],
        lines={"tokens/s": rates},
        y_from=0.0,
    )


def main() -> None:
    found = json.loads((RESULTS / "faults.json").read_text())
    PICTURES.mkdir(parents=True, exist_ok=True)
    titles = {"kill": "A host is killed, restarted by Ray, and loads its experts again"}
    if found["rebalance_moves"]:
        titles["rebalance"] = "Replicas move while 16 streams run"
    for name, title in titles.items():
        draw(PICTURES / f"{name}.svg", title, found["timelines"][name])
        print(PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()
