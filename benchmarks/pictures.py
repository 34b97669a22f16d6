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
# Of one point of a kill's picture: streams of one batch get their tokens at the same moment.
POINT_S = 2.0


def smoothed(values: list[float], points: int) -> list[float]:
    """Means of so many values each; what is left at the end is not shown."""
    whole = len(values) - len(values) % points
    return [sum(values[i : i + points]) / points for i in range(0, whole, points)]


def draw(
    path: Path,
    timeline: dict[str, Any],
    *,
    title: str,
    of: str,
    x_label: str,
    band: tuple[float, float, str],
    point_s: float,
) -> None:
    points = max(1, round(point_s / timeline["bucket_s"]))
    rates = smoothed(timeline["tokens_per_s"], points)
    step_s = timeline["bucket_s"] * points
    line_chart(
        path,
        title=title,
        x_label=x_label,
        y_label="tokens/s",
        x=[timeline["from_s"] + step_s * (n + 0.5) for n in range(len(rates))],
        lines={f"of all {of}": rates},
        y_from=0.0,
        band=band,
    )
    print(path)


def draw_kill(faults: dict[str, Any], path: Path) -> None:
    timeline = faults["timelines"]["kill"]
    draw(
        path,
        timeline,
        title="A host is killed, restarted by Ray, and loads its experts again",
        of="streams",
        x_label="seconds since it was killed",
        band=(0.0, timeline["ended_s"], "until all replicas are there again"),
        point_s=POINT_S,
    )


def draw_rebalance(skew: dict[str, Any], path: Path) -> None:
    moved = next(row["rebalance"] for row in skew["results"] if "rebalance" in row)
    draw(
        path,
        moved,
        title="A pool that never balanced is balanced under skewed traffic",
        of="routers",
        x_label="seconds since the rebalance began",
        band=(0.0, moved["seconds"], f"{moved['moves']} replicas move"),
        point_s=moved["bucket_s"],
    )


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_kill(json.loads((RESULTS / "faults.json").read_text()), PICTURES / "kill.svg")
    draw_rebalance(json.loads((RESULTS / "skew.json").read_text()), PICTURES / "rebalance.svg")


if __name__ == "__main__":
    main()
