"""Small charts as inline SVG, drawn in the page's own colours: points with errors, bars, curves with an envelope.

They hold numbers and labels alone, and labels are escaped. Invariant: what is not finite is not drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 10, 34


@dataclass(frozen=True)
class Axes:
    """Limits of a chart in data units, its title, labels and ticks (value, text)."""

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    x_label: str = ""

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place on the page; y outside of the limits is drawn at the limit."""
        y = min(max(y, self.y[0]), self.y[1])
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    def points(self, xs: Sequence[float], ys: Sequence[float], errors: Sequence[float] | None = None, shade: int = 0) -> str:
        """A dot a value, with a bar of ± its error."""
        parts = []
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if not (math.isfinite(x) and math.isfinite(y)):
                continue
            px, py = self.at(x, y)
            error = errors[k] if errors is not None and math.isfinite(errors[k]) else 0.0
            ends = self.at(x, y - error)[1], self.at(x, y + error)[1]
            parts.append(f"<line class='c{shade}' x1='{px:.1f}' x2='{px:.1f}' y1='{ends[0]:.1f}' y2='{ends[1]:.1f}'/>")
            parts.append(f"<circle class='c{shade}' cx='{px:.1f}' cy='{py:.1f}' r='3'/>")
        return "".join(parts)

    def curve(self, xs: Sequence[float], ys: Sequence[float], shade: int = 0) -> str:
        """A line through all points."""
        places = " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in zip(xs, ys, strict=True))
        return f"<polyline class='c{shade}' points='{places}'/>"

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
        """The area between two curves."""
        there = [self.at(x, y) for x, y in zip(xs, low, strict=True)]
        back = [self.at(x, y) for x, y in zip(xs, high, strict=True)][::-1]
        return f"<polygon class='area' points='{' '.join(f'{a:.1f},{b:.1f}' for a, b in there + back)}'/>"

    def level(self, y: float) -> str:
        """A dashed horizontal line."""
        (x1, py), (x2, _) = self.at(self.x[0], y), self.at(self.x[1], y)
        return f"<line class='aim' x1='{x1:.1f}' x2='{x2:.1f}' y1='{py:.1f}' y2='{py:.1f}'/>"

    def bars(self, edges: Sequence[float], heights: Sequence[float]) -> str:
        """A bar between each two edges."""
        parts = []
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            (x1, y1), (x2, y2) = self.at(left, height), self.at(right, self.y[0])
            parts.append(f"<rect class='bars' x='{x1:.1f}' y='{y1:.1f}' width='{x2 - x1 - 1:.1f}' height='{y2 - y1:.1f}'/>")
        return "".join(parts)

    def draw(self, *parts: str) -> str:
        """The whole chart as a figure."""
        (left, base), right = self.at(self.x[0], self.y[0]), self.at(self.x[1], self.y[1])[0]
        frame = [f"<line class='axis' x1='{left}' x2='{right}' y1='{base}' y2='{base}'/>"]
        for value, text in self.x_ticks:
            px = self.at(value, self.y[0])[0]
            frame.append(f"<text x='{px:.1f}' y='{base + 14:.1f}' text-anchor='middle'>{_text(text)}</text>")
        for value, text in self.y_ticks:
            py = self.at(self.x[0], value)[1]
            frame.append(f"<line class='grid' x1='{left}' x2='{right}' y1='{py:.1f}' y2='{py:.1f}'/>")
            frame.append(f"<text x='{left - 5}' y='{py + 3.5:.1f}' text-anchor='end'>{_text(text)}</text>")
        middle = (left + right) / 2
        frame.append(f"<text x='{middle:.1f}' y='{base + 29:.1f}' text-anchor='middle'>{_text(self.x_label)}</text>")
        body = "".join([*frame, *parts])
        head = f"<figcaption>{_text(self.title)}</figcaption>"
        return f"<figure class='chart'>{head}<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{body}</svg></figure>"


def _text(text: str) -> str:
    return html.escape("".join(c if c.isprintable() else "?" for c in text), quote=True)


COLOURS = ("#4c78b8", "#d9822b", "#3d9a6d", "#b5487c", "#8a6fc2", "#7a7a7a")
CSS = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem 1.4rem; }
.chart { max-width: 460px; } .chart figcaption { white-space: normal; }
.chart svg { width: 100%; height: auto; font-size: 10.5px; }
.chart text { fill: var(--soft); } .chart .axis { stroke: var(--soft); } .chart .grid { stroke: var(--line); stroke-width: .7; }
.chart .aim { stroke: var(--ink); stroke-dasharray: 4 3; stroke-width: 1; } .chart .area { fill: var(--soft); opacity: .22; }
.chart .bars { fill: #5b7fb4; } .chart polyline { fill: none; stroke-width: 1.6; }
.key { font-size: .8rem; color: var(--soft); }
"""
CSS += "\n".join(f".chart .c{k} {{ stroke: {c}; }} .chart circle.c{k} {{ fill: {c}; }}" for k, c in enumerate(COLOURS))
