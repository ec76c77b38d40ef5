"""Three plots as inline SVG: a scatter, curves over steps, and a map of what was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44
COLOURS = ("#8a94a6", "#d08770", "#2a9d8f", "#3b6fd4", "#b0508f", "#7a6ad8", "#6b8e23", "#c0392b")

Point = tuple[float, float, str]


def scatter(points: Mapping[str, Sequence[Point]], across: str, up: str) -> str:
    """Points (x, y, name) by kind; a name is shown when the pointer rests on its point."""
    every = [point for group in points.values() for point in group]
    if not every:
        return ""
    frame = _Frame([x for x, _, _ in every], [y for _, y, _ in every], across, up)
    marks = [
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="5" fill="{colour}" '
        f'fill-opacity="0.8"><title>{escape(name)}: {x:.2f}, {y:.1f}</title></circle>'
        for group, colour in zip(points.values(), _colours(points), strict=True)
        for x, y, name in group
    ]
    return frame.drawn(marks) + _legend(points)


def lines(series: Mapping[str, Sequence[float]], across: str, up: str) -> str:
    """One curve a series over its index, from 1."""
    every = [value for values in series.values() for value in values]
    if not every:
        return ""
    longest = max(len(values) for values in series.values())
    frame = _Frame([1, longest], [0, *every], across, up)
    marks = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
        + " ".join(f"{frame.x(i + 1):.1f},{frame.y(value):.1f}" for i, value in enumerate(values))
        + f'"><title>{escape(name)}</title></polyline>'
        for (name, values), colour in zip(series.items(), _colours(series), strict=True)
    ]
    return frame.drawn(marks) + _legend(series)


def heat_map(rows: Mapping[str, Sequence[float]]) -> str:
    """A row of cells for each series of shares in [0, 1]: dark is computed, pale is not."""
    if not rows:
        return ""
    longest = max(len(values) for values in rows.values())
    cell, label = (WIDTH - 150) / longest, 150
    marks = []
    for line, (name, values) in enumerate(rows.items()):
        top = 24 * line
        marks.append(
            f'<text x="{label - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>'
        )
        for step, share in enumerate(values):
            marks.append(
                f'<rect x="{label + step * cell:.2f}" y="{top}" width="{max(cell - 1, 0.5):.2f}" '
                f'height="20" fill="#3b6fd4" fill-opacity="{0.12 + 0.88 * share:.2f}">'
                f"<title>step {step}: {share:.0%} computed</title></rect>"
            )
    height = 24 * len(rows)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(marks)}</svg>'


class _Frame:
    """Axes around some data, and where a value lies in the picture."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], across: str, up: str) -> None:
        self.xs, self.ys = _span(xs), _span(ys)
        self.across, self.up = across, up

    def x(self, value: float) -> float:
        low, high = self.xs
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, marks: Sequence[str]) -> str:
        """The SVG with grid, labels and marks."""
        left, right, low, high = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
        parts = []
        for tick in _ticks(*self.xs):
            at = self.x(tick)
            parts += [_grid(at, at, high, low), _text(at, low + 16, f"{tick:g}")]
        for tick in _ticks(*self.ys):
            at = self.y(tick)
            parts += [_grid(left, right, at, at), _text(left - 6, at + 4, f"{tick:g}", "end")]
        parts.append(_text((left + right) / 2, HEIGHT - 8, self.across))
        parts.append(f'<g transform="translate(14 {(low + high) / 2}) rotate(-90)">')
        parts.append(_text(0, 0, self.up) + "</g>")
        inside = "".join([*parts, *marks])
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{inside}</svg>'


def _text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _grid(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or max(abs(high), 1.0) * 0.1
    return (low if low == 0 else low - pad), high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers inside the span."""
    raw = (high - low) / 6
    power = 10.0 ** int(f"{raw:e}".split("e")[1])
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= raw)
    first = int(low // step) + (low % step != 0)
    return [round(i * step, 12) for i in range(first, int(high // step) + 1)]


def _colours(names: Mapping[str, object]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(names))]


def _legend(names: Mapping[str, object]) -> str:
    entries = [
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, _colours(names), strict=True)
    ]
    return f'<p class="legend">{"".join(entries)}</p>'
