"""The pictures of a kill and a rebalance, from results of benchmarks: axes, bands and words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.pictures import draw_kill, draw_rebalance
from benchmarks.svg import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def kill(seconds: float = 20.0) -> dict[str, Any]:
    timeline = {"piece_s": 0.5, "from_s": -8.0, "ended_s": seconds}
    return {"worst_kill": timeline | {"longest_gap_s": [0.6] * int((seconds + 16) / 0.5)}}


def rebalance(seconds: float = 6.0) -> dict[str, Any]:
    rates = [700.0] * 40 + [800.0] * int(2 * seconds) + [1100.0] * 40
    moved = {"seconds": seconds, "moves": 38, "piece_s": 0.5, "from_s": -20.0}
    return {"results": [{"way": "balanced"}, {"rebalance": moved | {"tokens_per_s": rates}}]}


def boxes(path: Path) -> dict[str, tuple[float, float, float, float]]:
    """(left, top, right, bottom) of all words that stand upright, letters a little wide."""
    found = {}
    for number, text in enumerate(ElementTree.parse(path).getroot().iter(f"{SVG}text")):
        if text.get("transform"):
            continue
        size, words = float(text.get("font-size", 0)), text.text or ""
        width = 0.6 * size * len(words)
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "")]
        found[f"{number} {words}"] = (left, y - size, left + width, y)
    return found


def check_whole(path: Path) -> ElementTree.Element:
    """Nothing stands outside of the picture, and no words on others."""
    root = ElementTree.parse(path).getroot()
    _, _, width, height = (float(part) for part in root.get("viewBox", "").split())
    found = list(boxes(path).items())
    for index, (words, (left, top, right, bottom)) in enumerate(found):
        assert left >= 0, words
        assert top >= 0, words
        assert right <= width, words
        assert bottom <= height, words
        for others, (left2, top2, right2, bottom2) in found[index + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{words!r} stands on {others!r}"
    for line in root.iter(f"{SVG}polyline"):
        for x, y in re.findall(r"([\d.-]+),([\d.-]+)", line.get("points", "")):
            assert 70 <= float(x) <= width
            assert 64 <= float(y) <= height - 50
    return root


def band_of(root: ElementTree.Element) -> tuple[float, float]:
    shade = next(rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") != "#ffffff")
    left = float(shade.get("x", 0))
    return left, left + float(shade.get("width", 0))


@pytest.mark.parametrize("seconds", [0.7, 20.0, 95.0])
def test_a_kill_is_drawn_with_the_time_until_all_is_well(tmp_path: Path, seconds: float) -> None:
    draw_kill(kill(seconds), tmp_path / "kill.svg")
    left, right = band_of(check_whole(tmp_path / "kill.svg"))
    assert 70 < left < right <= 740


@pytest.mark.parametrize("seconds", [0.5, 6.0, 60.0])
def test_a_rebalance_is_drawn_with_its_moves(tmp_path: Path, seconds: float) -> None:
    draw_rebalance(rebalance(seconds), tmp_path / "rebalance.svg")
    root = check_whole(tmp_path / "rebalance.svg")
    left, right = band_of(root)
    assert 70 < left < right < 740
    assert any("38 replicas move" in words for words in boxes(tmp_path / "rebalance.svg"))


def test_a_band_stands_where_the_axis_says(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"

    def draw(band: tuple[float, float, str]) -> None:
        lines = {"a": [0.0, 1.0, 2.0]}
        line_chart(path, title="t", x_label="x", y_label="y", x=[0, 5, 10], lines=lines, band=band)

    draw((2.5, 5.0, "words"))
    assert band_of(ElementTree.parse(path).getroot()) == (237.5, 405.0)
    # What is beyond the axis is cut, and words that have no room to the right go to the left.
    draw((9.9, 99.0, "quite a few words"))
    assert band_of(check_whole(path))[1] == 740
