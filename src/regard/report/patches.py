"""Patches of a picture: marked with colours, or under a map of how much they are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Colour = tuple[int, int, int, int]
MARK: Colour = (220, 20, 20, 150)
GONE: Colour = (30, 30, 30, 215)
DIM, WARM = "#14171c", "#ff9d2e"


def paint(picture: Any, grid: tuple[int, int], cells: Mapping[int, Colour], side: int = 384) -> Any:
    """The picture with patches (row by row) coloured, its longer side about `side` pixels.

    >>> from PIL import Image
    >>> paint(Image.new("RGB", (8, 8)), (2, 2), {3: MARK}, side=32).size
    (32, 32)
    """
    from PIL import Image, ImageDraw

    rows, columns = grid
    cell = max(8, side // max(rows, columns))
    base = picture.resize((columns * cell, rows * cell)).convert("RGBA")
    layer = Image.new("RGBA", base.size)
    brush = ImageDraw.Draw(layer)
    for n, colour in cells.items():
        if 0 <= n < rows * columns:
            x, y = (n % columns) * cell, (n // columns) * cell
            brush.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour)
    return Image.alpha_composite(base, layer).convert("RGB")


def over(picture: Any, values: Any, span: tuple[float, float] | None = None) -> Any:
    """A map `[rows, columns]` laid over the picture: bright where it is looked at, dim elsewhere.

    `span` holds the values of the dimmest and of the brightest place; of the map when None.
    """
    import numpy as np
    from PIL import Image

    array = np.asarray(values, dtype=float)
    low, high = span or (float(array.min()), float(array.max()))
    level = ((array - low) / ((high - low) or 1.0)).clip(0, 1)
    mask = Image.fromarray((255 * level).round().astype("uint8")).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    plain = picture.convert("RGB")
    dim = Image.blend(plain, Image.new("RGB", plain.size, DIM), 0.75)
    warm = Image.blend(plain, Image.new("RGB", plain.size, WARM), 0.25)
    return Image.composite(warm, dim, mask)
