"""Lines, points and bars over axes: as an SVG, for pages, and as a picture, for contact sheets.

An SVG needs no script and follows the reader's choice of light or dark. What needs zoom or hover on
thousands of points is drawn by `figures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from regard.report.look import INKS, SERIES

SIZE = (430, 350)  # of one panel
INSET = (55, 30, 20, 42)  # left, top, right and bottom of a panel that the axes need
TEXT = 13
HEAD = 28  # of the legend's first line
LINE = 18  # of each further one
SCALE = 2  # pixels of a picture for one of an SVG: text stays sharp
PANEL = (SIZE[0] * SCALE, SIZE[1] * SCALE)  # of a picture, in pixels
SMOOTH = 2  # drawn so much larger and scaled down, which smooths slanted lines
GROUND = {"light": "#ffffff", "dark": "#14171c"}
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points `(x, y)` of one colour, joined in their order.

    Attributes:
        labels: a word beside each point, as many as points or none.
        tips: words that a pointer on a point brings up, in an SVG.
        corners: of the mark of a point: 4 a diamond, 3 a triangle, many a disc, 0 none.
        joined, dashed: how the points are joined.
    """

    name: str
    points: Sequence[Point]
    labels: Sequence[str] = ()
    corners: int = 24
    tips: Sequence[str] = ()
    joined: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines that share two axes, and what the axes measure.

    Attributes:
        x, y: the words under and over the axes.
        log_x, log_y: the base of a logarithmic axis; 0 is linear.
        marks: `(x, words)` where the x axis has words; round numbers if none.
        span: lowest and highest y; of the points if None.
        unit: what follows a number of the y axis.
    """

    x: str
    y: str
    lines: Sequence[Line]
    log_x: int = 0
    log_y: int = 0
    marks: Sequence[tuple[float, str]] = ()
    span: tuple[float, float] | None = None
    unit: str = ""


@dataclass(frozen=True)
class Chart:
    """Panels under one legend; a name has one colour in all of them.

    Attributes:
        title: what it shows, for those who cannot see it.
        columns: panels side by side; all if 0.
        size: of one panel.
        note: a line under the panels.
        file: where its SVG lies beside a Markdown page.

    >>> ball = Line("a ball", [(0, 0), (1, 3), (2, 0)])
    >>> Chart([Panel("time", "height", [ball])]).image().size
    (860, 756)

    Raises:
        ValueError: no panels, lines that are too many, or labels that do not match.
    """

    panels: Sequence[Panel]
    title: str = ""
    columns: int = 0
    size: tuple[int, int] = SIZE
    note: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("a chart needs panels")
        for line in (line for panel in self.panels for line in panel.lines):
            if any(words and len(words) != len(line.points) for words in (line.labels, line.tips)):
                raise ValueError("a line has one label a point, or none")
        if len(self.names) > len(SERIES["light"]):
            raise ValueError(
                f"more than {len(SERIES['light'])} lines cannot be told apart: leave some out"
            )

    @property
    def names(self) -> dict[str, Line]:
        """The lines of the legend, that have points, by name."""
        names: dict[str, Line] = {}
        for line in (line for panel in self.panels for line in panel.lines if line.points):
            names.setdefault(line.name, line)
        return names

    def svg(self) -> str:
        """The chart as the text of an SVG file; the same chart gives the same text."""
        brush = _Vector()
        return brush.whole(*self._draw(brush), self.title)

    def html(self) -> str:
        return f"<figure>{self.svg()}</figure>"

    def markdown(self) -> str:
        return f"![{self.title}]({self.file})"

    def image(self) -> Any:
        """The chart as a PIL image."""
        from PIL import Image

        probe = _Raster((1, 1))
        width, height = self._draw(probe)
        brush = _Raster((width, height))
        self._draw(brush)
        size = (width * SCALE, height * SCALE)
        return brush.picture.resize(size, Image.Resampling.LANCZOS)

    def _draw(self, brush: _Vector | _Raster) -> tuple[int, int]:
        """Draw everything; returns width and height."""
        columns = self.columns or len(self.panels)
        width = columns * self.size[0]
        x, y = 0.0, HEAD / 2
        for n, line in enumerate(self.names.values()):
            wide = 26 + brush.width(line.name)
            if x and INSET[0] + x + wide > width:
                x, y = 0.0, y + LINE
            at = INSET[0] + 6 + x
            if line.joined:
                brush.line([(at - 6, y), (at + 6, y)], f"c{n}", 2, line.dashed)
            if line.corners:
                brush.mark((at, y), f"c{n}", line.corners)
            brush.text((at + 11, y + 4), line.name, "start", "text")
            x += wide + 12
        top = y + HEAD / 2
        colors = {name: f"c{n}" for n, name in enumerate(self.names)}
        for n, panel in enumerate(self.panels):
            corner = (n % columns * self.size[0], top + n // columns * self.size[1])
            _panel(brush, panel, colors, corner, self.size)
        height = top + math.ceil(len(self.panels) / columns) * self.size[1]
        if self.note:
            brush.text((width / 2, height + 12), self.note, "middle", "muted")
            height += 24
        return width, round(height)


def chart(panels: Sequence[Panel]) -> Any:
    """Panels side by side under one legend, as a PIL image."""
    return Chart(panels).image()


@dataclass(frozen=True)
class Bar:
    """A bar with words at its end; `mark` is a value to compare it with."""

    name: str
    value: float
    words: str = ""
    mark: float | None = None
    color: int = 0


def bars(rows: Sequence[Bar], title: str, note: str = "") -> str:
    """Bars one under the other, as the text of an SVG file."""
    brush = _Vector()
    brush.text((180, 20), note if rows else "nothing was measured", "start", "muted")
    most = max((max(row.value, row.mark or 0) for row in rows), default=0) or 1
    for n, row in enumerate(rows):
        y, wide = 36 + 26 * n, 440 * row.value / most
        brush.text((172, y + 12), row.name, "end", "text")
        brush.box((180, y, wide, 16), f"c{row.color}")
        end = wide
        if row.mark is not None:
            end = max(wide, at := 440 * row.mark / most)
            brush.line([(180 + at, y - 3), (180 + at, y + 19)], "text", 2.5)
        brush.text((188 + end, y + 12), row.words, "start", "text")
    return brush.whole(760, 48 + 26 * max(len(rows), 1), title)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range, about `count` of them.

    >>> ticks(0.84, 1.01)
    [0.85, 0.9, 0.95, 1.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= 0.999 * rough)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class _Axis:
    """A range of values, from `low` to `high` after the logarithm where there is one."""

    low: float
    high: float
    base: int = 0

    @classmethod
    def of(cls, values: Sequence[float], base: int, whole: bool) -> _Axis:
        """The range of the values; with room at both ends, or up to whole powers of the base."""
        logs = [math.log(v, base) for v in values] if base else list(values)
        low, high = min(logs), max(logs)
        if base and whole:
            low, high = math.floor(low + 1e-9), math.ceil(high - 1e-9)
            return cls(low, max(high, low + 1), base)
        room = 0.08 * (high - low) or 1.0
        return cls(low - room, high + room, base)

    def share(self, value: float) -> float:
        return ((math.log(value, self.base) if self.base else value) - self.low) / (
            self.high - self.low
        )

    def ticks(self) -> list[float]:
        if not self.base:
            return ticks(self.low, self.high)
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        step = max(1, math.ceil((last - first) / 8))
        return [float(self.base) ** power for power in range(first, last + 1, step)]


def _panel(
    brush: _Vector | _Raster,
    panel: Panel,
    colors: dict[str, str],
    corner: Point,
    size: tuple[int, int],
) -> None:
    """One panel with its axes, that begins at a corner."""
    west, north = corner[0] + INSET[0], corner[1] + INSET[1]
    east, south = corner[0] + size[0] - INSET[2], corner[1] + size[1] - INSET[3]
    brush.text((west, north - 10), panel.y, "start", "text")
    points = [point for line in panel.lines for point in line.points]
    if not points:
        brush.text((west, (north + south) / 2), "nothing was measured", "start", "muted")
        return
    xs = [x for x, _ in points] + [x for x, _ in panel.marks]
    across = _Axis.of(xs, panel.log_x, not panel.marks)
    if panel.span:
        up = _Axis(*panel.span)
    else:
        up = _Axis.of([y for _, y in points], panel.log_y, True)

    def place(x: float, y: float) -> Point:
        return west + across.share(x) * (east - west), south - up.share(y) * (south - north)

    marks = panel.marks or [(x, f"{x:g}") for x in across.ticks()]
    for x, words in marks:
        at = west + across.share(x) * (east - west)
        brush.line([(at, north), (at, south)], "grid", 1)
        brush.text((at, south + 15), words, "middle", "muted")
    for y in up.ticks():
        at = south - up.share(y) * (south - north)
        brush.line([(west, at), (east, at)], "grid", 1)
        brush.text((west - 6, at + 4), f"{y:g}{panel.unit}", "end", "muted")
    brush.text(((west + east) / 2, south + 35), panel.x, "middle", "text")
    labelled: list[Point] = []
    for line in panel.lines:
        color, at_points = colors.get(line.name, ""), [place(*point) for point in line.points]
        if line.joined and len(at_points) > 1:
            brush.line(at_points, color, 2, line.dashed)
        for n, spot in enumerate(at_points if line.corners else ()):
            brush.mark(spot, color, line.corners, line.tips[n] if line.tips else "")
        for spot, label in zip(at_points, line.labels):
            if all(math.dist(spot, other) > TEXT for other in labelled):  # else on top of it
                brush.text((spot[0] + 6, spot[1] - 4), label, "start", color)
                labelled.append(spot)


class _Vector:
    """Draws an SVG."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def width(self, words: str) -> float:
        return 7.2 * len(words)  # an estimate: whoever shows the SVG chooses the font

    def text(self, at: Point, words: str, anchor: str, color: str) -> None:
        if words:
            side = "" if anchor == "start" else f' text-anchor="{anchor}"'
            self.parts.append(
                f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" class="f-{color}"{side}>'
                f"{escape(words)}</text>"
            )

    def line(self, points: Sequence[Point], color: str, width: float, dashed: bool = False) -> None:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.parts.append(f'<path d="M{path}" class="s-{color}" stroke-width="{width:g}"{dash}/>')

    def mark(self, at: Point, color: str, corners: int, tip: str = "") -> None:
        tip = f"<title>{escape(tip)}</title>" if tip else ""
        if corners > 4:
            shape = f'circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5"'
        else:
            spots = " ".join(f"{x:.1f},{y:.1f}" for x, y in _corners(at, 6, corners))
            shape = f'polygon points="{spots}"'
        end = f">{tip}</{shape.split()[0]}>" if tip else "/>"
        self.parts.append(f'<{shape} class="f-{color}"{end}')

    def box(self, box: tuple[float, float, float, float], color: str) -> None:
        x, y, width, height = box
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" class="f-{color}"/>'
        )

    def whole(self, width: float, height: float, title: str) -> str:
        def rules(theme: str) -> str:
            names = {**{n: INKS[theme][n] for n in ("text", "muted", "grid")}}
            names |= {f"c{n}": color for n, color in enumerate(SERIES[theme])}
            fills = "".join(f".chart .f-{n}{{fill:{c}}}" for n, c in names.items())
            strokes = "".join(f".chart .s-{n}{{stroke:{c}}}" for n, c in names.items())
            return f".chart .ground{{fill:{GROUND[theme]}}}{fills}{strokes}"

        dark = f"@media screen and (prefers-color-scheme:dark){{{rules('dark')}}}"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
                f'role="img" class="chart" font-family="system-ui, sans-serif" '
                f'font-size="{TEXT}" fill="none">',
                f"<title>{escape(title)}</title><style>{rules('light')}{dark}</style>",
                '<rect width="100%" height="100%" class="ground"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


class _Raster:
    """Draws a PIL image, in the light theme."""

    def __init__(self, size: tuple[int, int]) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.zoom = SCALE * SMOOTH
        whole = (size[0] * self.zoom, size[1] * self.zoom)
        self.picture = Image.new("RGB", whole, GROUND["light"])
        self.draw: Any = ImageDraw.Draw(self.picture)
        self.font = ImageFont.load_default(TEXT * self.zoom)

    def width(self, words: str) -> float:
        return float(self.draw.textlength(words, font=self.font)) / self.zoom

    def text(self, at: Point, words: str, anchor: str, color: str) -> None:
        side = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        self.draw.text(self._at(at), words, fill=_ink(color), font=self.font, anchor=side)

    def line(self, points: Sequence[Point], color: str, width: float, dashed: bool = False) -> None:
        for piece in _dashes(points) if dashed else [points]:
            spots = [self._at(p) for p in piece]
            self.draw.line(spots, fill=_ink(color), width=round(width * self.zoom), joint="curve")

    def mark(self, at: Point, color: str, corners: int, tip: str = "") -> None:
        radius = (5 if corners > 4 else 7.5) * self.zoom
        turned = 45 if corners == 4 else 0
        self.draw.regular_polygon((*self._at(at), radius), corners, turned, fill=_ink(color))

    def _at(self, at: Point) -> Point:
        return at[0] * self.zoom, at[1] * self.zoom


def _ink(color: str) -> str:
    return INKS["light"][color] if color in INKS["light"] else SERIES["light"][int(color[1:])]


def _corners(at: Point, radius: float, count: int) -> list[Point]:
    """The corners of a mark, the first on top."""
    turns = (2 * math.pi * n / count for n in range(count))
    return [(at[0] + radius * math.sin(t), at[1] - radius * math.cos(t)) for t in turns]


def _dashes(points: Sequence[Point]) -> list[list[Point]]:
    """The pieces of a dashed line."""
    pieces = []
    for a, b in pairwise(points):
        count = max(1, round(math.dist(a, b) / 10))
        for n in range(count):
            ends = (n / count, (n + 0.6) / count)
            pieces.append([(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])) for t in ends])
    return pieces
