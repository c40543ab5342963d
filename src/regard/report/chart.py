"""Lines over two axes as a picture, for results that are shown where no script runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.report.look import INKS

PANEL = (860, 700)  # pixels of one panel; twice what a page shows, so that text stays sharp
INSET = (110, 60, 24, 84)  # left, top, right and bottom of a panel that the axes need
HEAD = 56  # of the legend
TEXT = 26
SMOOTH = 2  # drawn so much larger and scaled down, which smooths slanted lines
INK = INKS["light"]
COLORS = tuple(INK[name] for name in ("line", "preplan", "anchor", "muted", "text"))


@dataclass(frozen=True)
class Line:
    """Points `(x, y)` of one colour, joined in their order.

    Attributes:
        labels: a word beside each point, as many as points or none.
        corners: of the mark of a point: 4 a diamond, 3 a triangle, many a disc.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    corners: int = 24


@dataclass(frozen=True)
class Panel:
    """Lines that share two axes, and what the axes measure."""

    x: str
    y: str
    lines: Sequence[Line]


def chart(panels: Sequence[Panel]) -> Any:
    """Panels side by side under one legend, as a PIL image; each shows the same lines, by name.

    >>> ball = Line("a ball", [(0, 0), (1, 3), (2, 0)])
    >>> chart([Panel("time", "height", [ball])]).size
    (860, 756)

    Raises:
        ValueError: nothing to draw, panels of other lines, too many lines, or labels that do not
            match.
    """
    from PIL import Image, ImageDraw

    if len({tuple(line.name for line in panel.lines) for panel in panels}) != 1:
        raise ValueError("a chart needs panels that show the same lines")
    lines = [line for panel in panels for line in panel.lines]
    if not lines or not all(line.points for line in lines):
        raise ValueError("a chart needs lines, and every line points")
    if any(line.labels and len(line.labels) != len(line.points) for line in lines):
        raise ValueError("a line has one label a point, or none")
    if len(panels[0].lines) > len(COLORS):
        raise ValueError(f"more than {len(COLORS)} lines cannot be told apart: leave some out")
    size = (len(panels) * PANEL[0], HEAD + PANEL[1])
    whole = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), "#ffffff")
    brush = _Brush(ImageDraw.Draw(whole))
    x, middle = INSET[0] + 12.0, HEAD / 2
    for color, line in zip(COLORS, panels[0].lines):
        brush.mark((x, middle), color, line.corners)
        x += 76 + brush.text((x + 22, middle), line.name, "lm")
    for n, panel in enumerate(panels):
        _draw(brush, panel, n * PANEL[0])
    return whole.resize(size, Image.Resampling.LANCZOS)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range, about `count` of them.

    >>> ticks(0.84, 1.01)
    [0.85, 0.9, 0.95, 1.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= 0.999 * rough)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Brush:
    """Draws in pixels of the finished picture."""

    def __init__(self, draw: Any) -> None:
        from PIL import ImageFont

        self.draw, self.font = draw, ImageFont.load_default(TEXT * SMOOTH)

    def text(
        self, at: tuple[float, float], words: str, anchor: str, color: str = INK["text"]
    ) -> float:
        """Write, and return how wide it is."""
        place = (at[0] * SMOOTH, at[1] * SMOOTH)
        self.draw.text(place, words, fill=color, font=self.font, anchor=anchor)
        return float(self.draw.textlength(words, font=self.font)) / SMOOTH

    def line(self, points: Sequence[tuple[float, float]], color: str, width: int) -> None:
        scaled = [(x * SMOOTH, y * SMOOTH) for x, y in points]
        self.draw.line(scaled, fill=color, width=width * SMOOTH, joint="curve")

    def mark(self, at: tuple[float, float], color: str, corners: int) -> None:
        radius = 10 if corners > 4 else 15
        circle = (at[0] * SMOOTH, at[1] * SMOOTH, radius * SMOOTH)
        self.draw.regular_polygon(circle, corners, 45 if corners == 4 else 0, fill=color)


def _draw(brush: _Brush, panel: Panel, left: float) -> None:
    """One panel with its axes, that begins so far from the left."""
    points = [point for line in panel.lines for point in line.points]
    (x0, x1), (y0, y1) = (_wide([point[axis] for point in points]) for axis in (0, 1))
    west, north = left + INSET[0], HEAD + INSET[1]
    east, south = left + PANEL[0] - INSET[2], HEAD + PANEL[1] - INSET[3]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return west + across * (east - west), south - up * (south - north)

    for x in ticks(x0, x1):
        brush.line([place(x, y0), place(x, y1)], INK["grid"], 2)
        brush.text((place(x, y0)[0], south + 10), f"{x:g}", "mt", INK["muted"])
    for y in ticks(y0, y1):
        brush.line([place(x0, y), place(x1, y)], INK["grid"], 2)
        brush.text((west - 12, place(x0, y)[1]), f"{y:g}", "rm", INK["muted"])
    brush.text(((west + east) / 2, south + 48), panel.x, "mt")
    brush.text((west, north - 16), panel.y, "lb")
    labelled: list[tuple[float, float]] = []
    for color, line in zip(COLORS, panel.lines):
        at = [place(*point) for point in line.points]
        brush.line(at, color, 4)
        for spot in at:
            brush.mark(spot, color, line.corners)
        for spot, label in zip(at, line.labels):
            if all(math.dist(spot, other) > TEXT for other in labelled):  # else on top of it
                brush.text((spot[0] + 11, spot[1] - 7), label, "lb", color)
                labelled.append(spot)


def _wide(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, with room at both ends."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room
