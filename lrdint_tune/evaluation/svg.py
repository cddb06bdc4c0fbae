"""Line charts as inline SVG; colours are CSS classes of the page that they stand in, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 40

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        name: for the legend and the tooltips.
        points: ``(x, y)``; those that are not finite are left out.
        style: a CSS class that gives ``color``.
        line: whether they are joined; otherwise each is a dot.
    """

    name: str
    points: Sequence[Point]
    style: str
    line: bool = True


def chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """A chart with a legend, as HTML; a note where there is nothing to draw."""
    shown = [(one, _finite(one.points)) for one in series]
    shown = [(one, points) for one, points in shown if points]
    head = f"<figure class='chart'><figcaption>{escape(title)}</figcaption>"
    if not shown:
        return f"{head}<p class='note'>no finite value</p></figure>"
    x_ticks = ticks([x for _, points in shown for x, _ in points], whole=True)
    y_ticks = ticks([y for _, points in shown for _, y in points])
    x_low, x_high = _limits(x_ticks, [x for _, points in shown for x, _ in points])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[str, str]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT) + _LEFT
        down = HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f}", f"{down:.1f}"

    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title, quote=True)}'>"]
    for value in y_ticks:
        _, y = place(x_low, value)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y}' y2='{y}'/>")
        parts.append(f"<text class='tick' x='{_LEFT - 6}' y='{y}' dy='.32em' text-anchor='end'>{value:g}</text>")
    for value in x_ticks:
        if x_low <= value <= x_high:
            x, _ = place(value, y_low)
            parts.append(
                f"<text class='tick' x='{x}' y='{HEIGHT - _BOTTOM + 16}' text-anchor='middle'>{value:g}</text>"
            )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f"<text class='axis' x='{middle}' y='{HEIGHT - 6}' text-anchor='middle'>{escape(x_label)}</text>")
    down = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f"<text class='axis' transform='translate(13 {down}) rotate(-90)' text-anchor='middle'>{escape(y_label)}</text>"
    )
    for one, points in shown:
        places = [place(x, y) for x, y in points]
        if one.line and len(points) > 1:
            parts.append(f"<polyline class='{one.style}' points='{' '.join(f'{x},{y}' for x, y in places)}'/>")
        radius = 2.2 if not one.line else 2.8 if len(points) < 60 else 0
        if radius:
            for (x, y), (at, value) in zip(places, points, strict=True):
                tip = escape(f"{one.name}, {x_label} {at:g}: {value:.4g}")
                kind = one.style + ("" if one.line else " dot")
                parts.append(f"<circle class='{kind}' cx='{x}' cy='{y}' r='{radius}'><title>{tip}</title></circle>")
    keys = "".join(f"<span class='{one.style}'>&#9632; {escape(one.name)}</span>" for one, _ in shown if one.line)
    return f"{head}{''.join(parts)}</svg><p class='legend'>{keys}</p></figure>"


def ticks(values: Iterable[float], *, whole: bool = False, count: int = 5) -> list[float]:
    """About ``count`` round numbers that enclose ``values``; at least two. ``whole``: no fractions between them."""
    values = list(values)
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):  # all alike
        margin = abs(low) * 0.1 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _limits(marks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """An axis that ends a little outside of the values, wherever the next mark is."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.03
    return (low - margin, high + margin) if high > low else (marks[0], marks[-1])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
