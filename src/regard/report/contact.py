"""Images side by side: a contact sheet as one picture, and as a page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regard.report.document import Page, Picture, Row, Section, png
from regard.report.look import INKS, ramp

__all__ = ["figure", "heat", "marked", "page", "png", "sheet"]

GAP = 8
LABEL = 16


def heat(values: Any, size: tuple[int, int], theme: str = "light") -> Any:
    """A map `[height, width]` in the colours of the reports, as a PIL image of `(width, height)`.

    Its least value takes the first colour, its greatest the last.
    """
    import numpy as np
    from PIL import Image

    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    level = (array - low) / (high - low) if high > low else np.zeros_like(array)
    colors = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in ramp(theme, 256)]
    table = np.asarray(colors, dtype=np.uint8)
    picture = Image.fromarray(table[(255 * level).round().astype(int)], "RGB")
    return picture.resize(size, Image.Resampling.NEAREST)


def marked(image: Any, point: tuple[int, int]) -> Any:
    """A copy of a PIL image in RGB with a red dot at a point (column, row)."""
    from PIL import ImageDraw

    copy = image.convert("RGB")
    x, y = point
    reach = max(2, min(copy.size) // 32)
    draw = ImageDraw.Draw(copy)
    for size, ink in ((reach + 1, "#ffffff"), (reach, "#d62728")):
        draw.ellipse((x - size, y - size, x + size, y + size), fill=ink)
    return copy


def sheet(
    rows: Sequence[Sequence[Any]], columns: Sequence[str], labels: Sequence[str] | None = None
) -> Any:
    """PIL images in a grid, a word over each column and, with labels, left of each row.

    Raises:
        ValueError: rows of different lengths, or labels that do not match.
    """
    from PIL import Image, ImageDraw

    names = [""] * len(rows) if labels is None else labels
    if not rows or any(len(row) != len(columns) for row in rows) or len(rows) != len(names):
        raise ValueError("a contact sheet needs one label a row and one image a column")
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    zoom = -(-96 // max(width, height))  # tiny images would hide under their labels
    width, height = zoom * width, zoom * height
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + (0 if labels is None else max(int(probe.textlength(t)) for t in names) + GAP)
    pitch = GAP + max(width, *(int(probe.textlength(name)) for name in columns))
    ink = INKS["light"]
    whole = Image.new(
        "RGB",
        (left + len(columns) * pitch, LABEL + GAP + len(rows) * (height + GAP)),
        "#ffffff",
    )
    draw = ImageDraw.Draw(whole)
    for n, name in enumerate(columns):
        draw.text((left + n * pitch, 4), name, fill=ink["text"])
    for r, row in enumerate(rows):
        top = LABEL + GAP + r * (height + GAP)
        draw.text((GAP, top), names[r], fill=ink["muted"])
        for c, image in enumerate(row):
            shown = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            whole.paste(shown, (left + c * pitch, top))
    return whole


def figure(image: Any, caption: str, width: int | None = None) -> Any:
    """One picture with its caption, for a page; so many pixels wide."""
    return Picture(image, caption, width)


def page(title: str, notes: Sequence[str], sections: Mapping[str, Sequence[Any]]) -> str:
    """A page of pictures that opens offline: heading -> pictures of a row."""
    rows = [Section(heading, [Row(figures)]) for heading, figures in sections.items()]
    return Page(title, rows, intro=notes, about="pictures").html()
