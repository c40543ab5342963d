"""Cells with words around them as a picture, for results that are shown where no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.report.look import INKS, ramp

INK = INKS["light"]
TEXT = 26
SIDE = 170  # pixels left of the cells for the names of the rows
EDGE = 24  # the same without names, and right of the cells
LINE = TEXT + 14  # of a line of words

Label = tuple[float, str]


def grid(
    cells: Sequence[Sequence[float]],
    size: tuple[int, int],
    *,
    title: str = "",
    rows: Sequence[str] = (),
    above: Sequence[Label] = (),
    below: Sequence[Label] = (),
    span: tuple[float, float] | None = None,
    numbers: bool = False,
    frames: Sequence[tuple[float, float, float, float]] = (),
) -> Any:
    """Draw cells `[rows][columns]` in the colours of the reports, as a PIL image.

    Args:
        size: width and height in pixels, with the words.
        rows: a name left of each row, or none at all.
        above, below: words over and under the cells, each at a place counted in columns.
        span: the values of the first and of the last colour; of the cells when None.
        numbers: write its value into each cell.
        frames: outlines: left, top, right and bottom, counted in columns and rows.

    >>> grid([[0.1, 0.9]], (400, 120), rows=["layer 0"], numbers=True).size
    (400, 120)

    Raises:
        ValueError: no cells, rows of different lengths, or not one name a row.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not cells or not cells[0] or len({len(row) for row in cells}) != 1:
        raise ValueError("a grid needs cells, and rows of one length")
    if rows and len(rows) != len(cells):
        raise ValueError("a grid has one name a row, or none")
    low, high = span or (min(map(min, cells)), max(map(max, cells)))
    whole = Image.new("RGB", size, "#ffffff")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(TEXT)
    west, east = SIDE if rows else EDGE, size[0] - EDGE
    north = LINE * (bool(title) + bool(above)) + 4
    south = size[1] - (LINE if below else 4)
    colors = ramp("light", 256)

    def place(column: float, row: float) -> tuple[int, int]:
        across, down = column / len(cells[0]), row / len(cells)
        return round(west + across * (east - west)), round(north + down * (south - north))

    def write(at: tuple[float, float], words: str, anchor: str, color: str) -> None:
        draw.text(at, words, fill=color, font=font, anchor=anchor)

    write((west, 4), title, "la", INK["text"])
    for r, row in enumerate(cells):
        for c, value in enumerate(row):
            level = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
            (x0, y0), (x1, y1) = place(c, r), place(c + 1, r + 1)
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colors[int(255 * level)])
            if numbers:
                ink = "#ffffff" if level > 0.5 else INK["text"]
                number = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
                write(((x0 + x1) / 2, (y0 + y1) / 2), number, "mm", ink)
    for n, name in enumerate(rows):
        write((west - 12, place(0, n + 0.5)[1]), name, "rm", INK["text"])
    for column, word in above:
        write((place(column, 0)[0], north - 12), word, "ms", INK["text"])
    for column, word in below:
        write((place(column, 0)[0], south + 6), word, "ma", INK["muted"])
    for left, top, right, bottom in frames:
        draw.rectangle((*place(left, top), *place(right, bottom)), outline=INK["preplan"], width=3)
    return whole


def stacked(rows: Sequence[Sequence[Any]]) -> Any:
    """Pictures row under row on one white page, those of a row side by side, as a PIL image."""
    from PIL import Image

    size = (
        max(sum(picture.width for picture in row) for row in rows),
        sum(max(picture.height for picture in row) + EDGE for row in rows),
    )
    whole, top = Image.new("RGB", size, "#ffffff"), 0
    for row in rows:
        left = 0
        for picture in row:
            whole.paste(picture, (left, top))
            left += picture.width
        top += max(picture.height for picture in row) + EDGE
    return whole
