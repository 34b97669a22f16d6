"""The pictures of the documentation: points, axes, bands and words."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.charts import line_chart
from benchmarks.pictures import draw_kill, draw_rebalance, draw_top
from tests.helpers.paths import ROOT

PICTURES = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def kill(seconds: float = 20.0) -> dict[str, Any]:
    timeline = {"piece_s": 0.5, "from_s": -8.0, "ended_s": seconds}
    return {"worst_kill": timeline | {"longest_gap_s": [0.6] * int((seconds + 16) / 0.5)}}


def rebalance(seconds: float = 6.0) -> dict[str, Any]:
    rates = [700.0] * 40 + [800.0] * int(2 * seconds) + [1100.0] * 40
    moved = {"seconds": seconds, "moves": 38, "piece_s": 0.5, "from_s": -20.0}
    return {"results": [{"way": "balanced"}, {"rebalance": moved | {"tokens_per_s": rates}}]}


def chart(path: Path, **more: Any) -> Figure:
    lines = {"a & b": [1.0, 3.0, 2.0], "c": [0.0, 0.0, 1.0]}
    given = {"title": "t", "x_label": "x", "y_label": "y", "x": [0, 5, 10], "lines": lines}
    return line_chart(path, **(given | more))


def check_whole(figure: Figure) -> None:
    """Check that no words stand outside of the picture, or on others."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    (axes,) = figure.axes
    # Ticks beyond an axis' ends exist, and are not drawn.
    hidden = {
        label
        for axis in (axes.xaxis, axes.yaxis)
        for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= at <= max(axis.get_view_interval())
    }
    texts = {text for text in figure.findobj(Text) if isinstance(text, Text)} - hidden
    seen = [text for text in texts if text.get_visible() and text.get_text()]
    boxes = {text: text.get_window_extent() for text in seen}
    assert len(boxes) > 8, "title, labels, legend and ticks"
    for text, box in boxes.items():
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    for (one, box), (other, box2) in combinations(boxes.items(), 2):
        assert not box.overlaps(box2), f"{one} stands on {other}"


def band_of(figure: Figure) -> tuple[float, float]:
    (shade,) = figure.axes[0].patches
    ends = shade.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    return tuple(figure.axes[0].transData.inverted().transform(ends)[:, 0])


def words_in(path: Path) -> set[str]:
    return {text.text or "" for text in ElementTree.parse(path).getroot().iter(f"{SVG}text")}


@pytest.mark.parametrize("seconds", [0.7, 20.0, 95.0])
def test_a_kill_is_drawn_with_the_time_until_all_is_well(tmp_path: Path, seconds: float) -> None:
    figure = draw_kill(kill(seconds), tmp_path / "kill.svg")
    check_whole(figure)
    assert band_of(figure) == pytest.approx((0.0, seconds))
    assert "until all replicas are there again" in words_in(tmp_path / "kill.svg")


@pytest.mark.parametrize("seconds", [0.5, 6.0, 60.0])
def test_a_rebalance_is_drawn_with_its_moves(tmp_path: Path, seconds: float) -> None:
    figure = draw_rebalance(rebalance(seconds), tmp_path / "rebalance.svg")
    check_whole(figure)
    assert band_of(figure) == pytest.approx((0.0, seconds))
    assert "38 replicas move" in words_in(tmp_path / "rebalance.svg")


def test_a_band_ends_where_the_axis_ends(tmp_path: Path) -> None:
    assert band_of(chart(tmp_path / "a.svg", band=(2.5, 99.0, "w"))) == pytest.approx((2.5, 10.0))


def test_a_chart_has_a_line_for_each_series_and_all_words(tmp_path: Path) -> None:
    path = tmp_path / "new" / "chart.svg"
    figure = chart(path, x_ticks=[0, 5, 20], y_from=-1.0)
    check_whole(figure)
    (axes,) = figure.axes
    assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines] == [[1, 3, 2], [0, 0, 1]]
    assert axes.get_xlim() == (0, 20)
    assert axes.get_ylim()[0] == -1
    assert {"t", "x", "y", "a & b", "c", "0", "5", "20"} <= words_in(path)
    with pytest.raises(ValueError, match="'c' has 1 points"):
        chart(path, lines={"c": [1.0]})


def test_thousands_have_a_comma_and_fractions_no_zeros(tmp_path: Path) -> None:
    chart(tmp_path / "a.svg", x=[0, 1000, 2000], lines={"a": [0.0, 0.5, 1.0]})
    assert {"1,000", "2,000", "0.2", "1"} <= words_in(tmp_path / "a.svg")


def test_the_same_data_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        chart(tmp_path / name, band=(1.0, 2.0, "w"))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


CHARTS = sorted(path for path in PICTURES.glob("*.svg") if path.stem != "top")


@pytest.mark.parametrize("path", CHARTS, ids=lambda path: path.stem)
def test_charts_of_the_pages_name_both_axes_and_no_date(path: Path) -> None:
    text = path.read_text()
    assert all(f'id="{axis}-axis"' in text for axis in "xy")
    assert "<dc:date>" not in text
    assert ElementTree.fromstring(text).find(f"{SVG}title") is not None


def test_only_who_draws_loads_what_draws() -> None:
    code = "import benchmarks.pictures, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_picture_of_top_loads_nothing_and_cuts_nothing(tmp_path: Path) -> None:
    host = {
        "name": "host-0",
        "state": "up",
        "replicas": 120,
        "queued_rows": 3,
        "throughput": {"calls_per_s": 412.0, "rows_per_s": 1250.0, "busy_fraction": 0.41},
    }
    seen = {
        "placement": {"term": 1, "epoch": 2},
        "router_count": 1,
        "pending_moves": 0,
        "missing_experts": 0,
        "unprotected_experts": 240,
        "warnings": [],
        "error": None,
        "models": [
            {
                "name": "demo",
                "assignments_per_s": 2500.0,
                "balancedness": {"mean": 0.97, "worst": 0.9},
            }
        ],
        "hosts": [host],
        "hottest_experts": [
            {
                "model": "demo",
                "layer": 3,
                "expert": 5,
                "assignments_per_s": 9.0,
                "hosts": ["host-0"],
            }
        ],
    }
    drawn = draw_top(seen, tmp_path / "top.svg")
    assert "https://cdn" not in drawn
    words = "".join(ElementTree.parse(tmp_path / "top.svg").getroot().itertext())
    for word in ("host-0", "assignments/s", "0.970", "41%", "1,250"):
        assert word in words.replace("\xa0", " ")
