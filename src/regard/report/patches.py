"""Patches of a picture: marked with colours, or under a map of how much they are looked at.

A part is where a grid lies on the picture, as shares of it: (left, top, right, bottom), beyond 0
and 1 where a model pads the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int, int]
MARK: Colour = (220, 20, 20, 150)
GONE: Colour = (30, 30, 30, 215)
UNSEEN: Colour = (128, 128, 128, 235)
DIM, WARM, LINE = "#14171c", "#ff9d2e", "#ff9d2e"
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def paint(picture: Any, grid: tuple[int, int], cells: Mapping[int, Colour], side: int = 384) -> Any:
    """The picture with patches (row by row) coloured, its longer side about `side` pixels.

    >>> from PIL import Image
    >>> paint(Image.new("RGB", (8, 8)), (2, 2), {3: MARK}, side=32).size
    (32, 32)
    """
    rows, columns = grid
    cell = max(8, side // max(rows, columns))
    return tint(picture.resize((columns * cell, rows * cell)), [(WHOLE, grid, cells)])


def tint(picture: Any, parts: Sequence[tuple[Box, tuple[int, int], Mapping[int, Colour]]]) -> Any:
    """The picture with cells of the grids on its parts coloured: (part, (rows, columns), cells).

    >>> from PIL import Image
    >>> half = tint(Image.new("RGB", (8, 8)), [((0.5, 0, 1, 1), (1, 1), {0: (255, 0, 0, 255)})])
    >>> half.getpixel((3, 0)), half.getpixel((4, 0))
    ((0, 0, 0), (255, 0, 0))
    """
    from PIL import Image, ImageDraw

    base = picture.convert("RGBA")
    layer = Image.new("RGBA", base.size)
    brush = ImageDraw.Draw(layer)
    for part, (rows, columns), cells in parts:
        left, top, right, bottom = _pixels(part, base.size)
        wide, high = (right - left) / columns, (bottom - top) / rows
        for n, colour in cells.items():
            if 0 <= n < rows * columns:
                x, y = left + (n % columns) * wide, top + (n // columns) * high
                box = [round(v) for v in (x, y, x + wide, y + high)]
                brush.rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=colour)
    return Image.alpha_composite(base, layer).convert("RGB")


def over(picture: Any, values: Any, span: tuple[float, float] | None = None) -> Any:
    """A map `[rows, columns]` laid over the picture: bright where it is looked at, dim elsewhere.

    `span` holds the values of the dimmest and of the brightest place; of the map when None.
    """
    return spread(picture, [(WHOLE, values)], span)


def spread(
    picture: Any, parts: Sequence[tuple[Box, Any]], span: tuple[float, float] | None = None
) -> Any:
    """Maps laid over the parts of the picture that they belong to, on one scale; what no part
    shows is grey.
    """
    import numpy as np
    from PIL import Image

    arrays = [np.asarray(values, dtype=float) for _, values in parts]
    low, high = span or (min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays))
    plain = picture.convert("RGB")
    bright = Image.new("L", plain.size)
    seen = Image.new("L", plain.size)
    for (part, _), array in zip(parts, arrays):
        level = ((array - low) / ((high - low) or 1.0)).clip(0, 1)
        left, top, right, bottom = (round(v) for v in _pixels(part, plain.size))
        size = (max(1, right - left), max(1, bottom - top))
        mask = Image.fromarray((255 * level).round().astype("uint8"))
        bright.paste(mask.resize(size, Image.Resampling.BICUBIC), (left, top))
        seen.paste(255, (left, top, left + size[0], top + size[1]))
    dim = Image.blend(plain, Image.new("RGB", plain.size, DIM), 0.75)
    warm = Image.blend(plain, Image.new("RGB", plain.size, WARM), 0.25)
    grey = Image.blend(plain, Image.new("RGB", plain.size, UNSEEN[:3]), UNSEEN[3] / 255)
    return Image.composite(Image.composite(warm, dim, bright), grey, seen)


def outlined(picture: Any, parts: Sequence[Box]) -> Any:
    """The picture with a line around each part; what no part shows is grey.

    >>> from PIL import Image
    >>> shown = outlined(Image.new("RGB", (40, 20), "white"), [(0.0, 0.0, 0.5, 1.0)])
    >>> shown.getpixel((10, 10)), shown.getpixel((30, 10)) == (255, 255, 255)
    ((255, 255, 255), False)
    """
    from PIL import Image, ImageDraw

    plain = picture.convert("RGB")
    seen = Image.new("L", plain.size)
    boxes = [[round(v) for v in _pixels(part, plain.size)] for part in parts]
    for left, top, right, bottom in boxes:
        seen.paste(255, (left, top, right, bottom))
    grey = Image.blend(plain, Image.new("RGB", plain.size, UNSEEN[:3]), UNSEEN[3] / 255)
    whole = Image.composite(plain, grey, seen)
    brush = ImageDraw.Draw(whole)
    for left, top, right, bottom in boxes:
        corner = (min(right, plain.width) - 1, min(bottom, plain.height) - 1)
        brush.rectangle((max(left, 0), max(top, 0), *corner), outline=LINE, width=2)
    return whole


def _pixels(part: Box, size: tuple[int, int]) -> Box:
    left, top, right, bottom = part
    return (left * size[0], top * size[1], right * size[0], bottom * size[1])
