"""The pictures of a running pool in README and docs, from results of benchmarks and of `top`.

    moesaic top --json --experts 4 > benchmarks/results/top.json    # while a load runs
    python -m benchmarks.pictures

`benchmarks.elasticity.simulation` draws its own.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.charts import PICTURES, line_chart
from benchmarks.measure import RESULTS
from moesaic.cli.live.top import frame
from moesaic.cluster.reports.activity import Activity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def middles(timeline: dict[str, Any], values: str) -> list[float]:
    """The seconds at which the pieces of a timeline are drawn."""
    piece_s = timeline["piece_s"]
    return [timeline["from_s"] + piece_s * (n + 0.5) for n in range(len(timeline[values]))]


def draw_kill(faults: dict[str, Any], path: Path) -> Figure:
    timeline = faults["worst_kill"]
    # Where all texts have ended and prompts are read, nobody waits for a next token.
    shown = [
        (x, gap_s)
        for x, gap_s in zip(
            middles(timeline, "longest_gap_s"), timeline["longest_gap_s"], strict=True
        )
        if gap_s
    ]
    return line_chart(
        path,
        title="A host is killed, restarted by Ray, and loads its experts again",
        x_label="seconds since it was killed",
        y_label="seconds between two tokens",
        x=[x for x, _ in shown],
        lines={"of the stream that waits longest": [gap_s for _, gap_s in shown]},
        y_from=0.0,
        band=(0.0, timeline["ended_s"], "until all replicas are there again"),
    )


def draw_rebalance(skew: dict[str, Any], path: Path) -> Figure:
    moved = next(row["rebalance"] for row in skew["results"] if "rebalance" in row)
    return line_chart(
        path,
        title="A pool that never balanced is balanced under skewed traffic",
        x_label="seconds since the rebalance began",
        y_label="tokens/s",
        x=middles(moved, "tokens_per_s"),
        lines={"of all routers": moved["tokens_per_s"]},
        y_from=0.0,
        band=(0.0, moved["seconds"], f"{moved['moves']} replicas move"),
    )


def draw_top(activity: dict[str, Any], path: Path) -> str:
    """Draw what a terminal of 80 columns shows."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(frame("local", Activity.model_validate(activity)))
    drawn = console.export_svg(title="moesaic top", unique_id="top")
    # Rich names fonts on another server; a reader's own monospaced font does as well.
    drawn = re.sub(r"@font-face {.*?}\s*", "", drawn, flags=re.DOTALL)
    path.write_text(drawn)
    return drawn


def main() -> None:
    for draw, name, path in (
        (draw_kill, "faults.json", PICTURES / "kill.svg"),
        (draw_rebalance, "skew.json", PICTURES / "rebalance.svg"),
        (draw_top, "top.json", PICTURES / "top.svg"),
    ):
        if (RESULTS / name).is_file():
            draw(json.loads((RESULTS / name).read_text()), path)
            print(path)
        else:
            print(f"{path} stays: there is no {RESULTS / name}")


if __name__ == "__main__":
    main()
