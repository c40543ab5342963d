"""What a grid of image tokens shows: a picture, a tile or crop of it, or a frame of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Grid = tuple[int, ...]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the picture; beyond 0 and 1 where a model pads it."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """One grid of image tokens.

    Attributes:
        image: which image of its row it is in (`Images.number`); its cells are the patches from
            `first` on, row by row.
        rows, columns: of the grid.
        picture: which picture or video of the row it shows, counted from 0 as they come in the
            prompt.
        name: "whole"; "fine", the whole at a higher resolution; "tile 2, 1" and "crop 1", parts of
            it; "frame 3" of a video.
        box: where it lies on the picture; None where that takes the processor and the size of the
            picture, and they were not given.

    >>> View(0, 0, 2, 4, 0, "whole", WHOLE).cell(5)
    (0.25, 0.5, 0.5, 1.0)
    """

    image: int
    first: int
    rows: int
    columns: int
    picture: int
    name: str
    box: Box | None

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    @property
    def part(self) -> bool:
        """Whether it shows a tile or crop: together with its like it makes up a picture."""
        return self.name.startswith(("tile", "crop"))

    def cell(self, n: int) -> Box | None:
        """Where a cell lies on the picture."""
        if self.box is None:
            return None
        left, top, right, bottom = self.box
        wide, high = (right - left) / self.columns, (bottom - top) / self.rows
        row, column = divmod(n, self.columns)
        left, top = left + column * wide, top + row * high
        return (left, top, left + wide, top + high)


def panels(views: Sequence[View]) -> list[tuple[int, str, list[int]]]:
    """Which views are drawn on one copy of a picture: (picture, what they are, their numbers).

    >>> tiles = [View(n, 0, 2, 2, 0, f"tile 1, {n + 1}", None) for n in range(2)]
    >>> panels([*tiles, View(2, 0, 2, 2, 0, "whole", None)])
    [(0, 'tiles', [0, 1]), (0, 'whole', [2])]
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for n, view in enumerate(views):
        name = view.name.split()[0] + "s" if view.part else view.name
        groups.setdefault((view.picture, name), []).append(n)
    return [(picture, name, members) for (picture, name), members in groups.items()]
