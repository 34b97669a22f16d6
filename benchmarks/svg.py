"""Line charts as SVG files, for the documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT = 760, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 64, 50
# Okabe and Ito's colours, which nearly everybody can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# The width of a letter, nearly.
_LETTER = 7.2
_FONT = 'font-family="system-ui, sans-serif"'


def nice_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = max(high - low, 1e-12) / about
    power = 10 ** math.floor(math.log10(span))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


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
) -> None:
    """Write one chart; every line has as many points as ``x``. Raises ValueError otherwise.

    ``band``: a part of the x axis that is shaded, and the words that stand in it or beside it.
    """
    for name, values in lines.items():
        if len(values) != len(x):
            raise ValueError(f"lines: {name!r} has {len(values)} points, x has {len(x)}")
    every = [value for values in lines.values() for value in values]
    ys = nice_ticks(min(every) if y_from is None else y_from, max(every))
    xs = list(x_ticks) if x_ticks is not None else nice_ticks(min(x), max(x), 8)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at_x(value: float) -> float:
        return _LEFT + (value - xs[0]) / (xs[-1] - xs[0]) * (right - _LEFT)

    def at_y(value: float) -> float:
        return bottom - (value - ys[0]) / (ys[-1] - ys[0]) * (bottom - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 24, title, size=16, weight="600"),
    ]
    if band is not None:
        parts += _band(at_x(max(band[0], xs[0])), at_x(min(band[1], xs[-1])), band[2])
    for tick in ys:
        parts.append(_line(_LEFT, at_y(tick), right, at_y(tick), "#e4e4e4"))
        parts.append(_text(_LEFT - 8, at_y(tick) + 4, _number(tick), anchor="end"))
    for tick in xs:
        parts.append(_line(at_x(tick), bottom, at_x(tick), bottom + 5, "#444444"))
        parts.append(_text(at_x(tick), bottom + 20, _number(tick), anchor="middle"))
    parts.append(_line(_LEFT, bottom, right, bottom, "#444444"))
    parts.append(_line(_LEFT, _TOP, _LEFT, bottom, "#444444"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 10, x_label, anchor="middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="18" y="{middle:.1f}" {_FONT} font-size="12" fill="#333333" text-anchor="middle" '
        f'transform="rotate(-90 18 {middle:.1f})">{escape(y_label)}</text>'
    )
    legend_x = float(_LEFT)
    for index, (name, values) in enumerate(lines.items()):
        color = _COLORS[index % len(_COLORS)]
        points = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(x, values, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8" '
            'stroke-linejoin="round"/>'
        )
        parts.append(_line(legend_x, 44, legend_x + 22, 44, color, width=3))
        parts.append(_text(legend_x + 28, 48, name))
        legend_x += 52 + _LETTER * len(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _band(left: float, right: float, words: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    shade = (
        f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{bottom - _TOP}" '
        'fill="#f3ead8"/>'
    )
    # Below the lines, which begin at zero; to the left where there is no room to the right.
    fits = left + 6 + _LETTER * len(words) <= _WIDTH - _RIGHT
    where, anchor = (left + 6, "start") if fits else (right - 6, "end")
    return [shade, _text(where, bottom - 8, words, anchor=anchor)]


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"/>'


def _text(
    x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {_FONT} font-size="{size}" font-weight="{weight}" '
        f'fill="#333333" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
