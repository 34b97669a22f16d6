"""Line charts as SVG files, for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
_SIZE_INCHES = (7.6, 3.6)
# Okabe and Ito's colours, which nearly everybody can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_INK, _GRID, _SHADE = "#333333", "#e4e4e4", "#f3ead8"
# Fewer points are marked, because the line between them says nothing.
_MARKED = 20
_STYLE: dict[RcKeyType, Any] = {
    # White also where the page is dark; words are words, so that they can be read and searched.
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    # The same data make the same file.
    "svg.hashsalt": "moesaic",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


def line_chart(
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    x_ticks: Sequence[float] | None = None,
    y_from: float | None = None,
    band: tuple[float, float, str] | None = None,
) -> Figure:
    """Write one chart, and return it; every line has as many points as ``x``.

    Raises ValueError otherwise. ``band``: a part of the x axis that is shaded, and what it is.
    """
    # Only who draws needs it.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    for name, values in lines.items():
        if len(values) != len(x):
            raise ValueError(f"lines: {name!r} has {len(values)} points, x has {len(x)}")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        marker = "o" if len(x) < _MARKED else None
        for (name, values), color in zip(lines.items(), _COLORS, strict=False):
            axes.plot(
                x, values, color=color, marker=marker, markersize=4, label=name, clip_on=False
            )
        left, right = (min(x), max(x)) if x_ticks is None else (x_ticks[0], x_ticks[-1])
        axes.set_xlim(left, right)
        if x_ticks is not None:
            axes.set_xticks(x_ticks)
        if band is not None:
            ends = max(band[0], left), min(band[1], right)
            axes.axvspan(*ends, color=_SHADE, zorder=0, label=band[2])
        if y_from is not None:
            axes.set_ylim(bottom=y_from)
        for axis, label, gid in ((axes.xaxis, x_label, "x-axis"), (axes.yaxis, y_label, "y-axis")):
            axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
            axis.set_label_text(label)
            axis.set_gid(gid)
        figure.suptitle(title, x=0.02, horizontalalignment="left", weight="bold")
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.2
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Title": title, "Date": None, "Creator": None}
        figure.savefig(path, format="svg", metadata=metadata)
    return figure


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
