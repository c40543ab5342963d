"""Cells as a picture: every cell where it belongs, in the colour of its value."""

from __future__ import annotations

import pytest

pytest.importorskip("PIL")

from PIL import Image

from regard.report.grid import EDGE, LINE, SIDE, grid, stacked
from regard.report.look import INKS, ramp


def colour(picture: Image.Image, x: float, y: float) -> str:
    pixel = picture.getpixel((int(x), int(y)))
    assert isinstance(pixel, tuple)
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def test_cells_lie_in_order_and_take_the_colour_of_their_value() -> None:
    low, high = ramp("light", 2)
    picture = grid([[0.0, 1.0], [1.0, 0.0]], (448, 208))
    assert picture.size == (448, 208)
    left, right, top, bottom = EDGE + 100, EDGE + 300, 4 + 50, 4 + 150
    assert colour(picture, left, top) == colour(picture, right, bottom) == low
    assert colour(picture, right, top) == colour(picture, left, bottom) == high
    shared = grid([[0.0, 1.0], [1.0, 0.0]], (448, 208), span=(0.0, 4.0))
    assert colour(shared, right, top) not in (low, high)
    constant = grid([[2.0, 2.0]], (448, 208))
    assert colour(constant, left, top) == low


def test_words_leave_the_cells_their_room() -> None:
    high = ramp("light", 2)[1]
    plain = grid([[0.0, 1.0]], (600, 200))
    named = grid([[0.0, 1.0]], (600, 200), title="t", rows=["r"], above=[(0.5, "a")])
    assert colour(plain, 599 - EDGE, 10) == high
    assert colour(named, 599 - EDGE, 2 * LINE) == "#ffffff"
    assert colour(named, 599 - EDGE, 2 * LINE + 8) == high
    assert colour(named, SIDE - 2, 150) == "#ffffff"
    framed = grid([[0.0, 1.0]], (600, 200), frames=[(1, 0, 2, 1)])
    assert colour(framed, EDGE + (600 - 2 * EDGE) / 2, 100) == INKS["light"]["preplan"]


def test_pictures_are_stacked() -> None:
    one, two = Image.new("RGB", (30, 20), "#ff0000"), Image.new("RGB", (50, 10), "#0000ff")
    whole = stacked([[one, two], [two]])
    assert whole.size == (80, 20 + 10 + 2 * EDGE)
    assert colour(whole, 5, 5) == "#ff0000" and colour(whole, 75, 5) == "#0000ff"
    assert colour(whole, 5, 20 + EDGE + 5) == "#0000ff"


def test_what_cannot_be_drawn_is_refused() -> None:
    wrong: list[list[list[float]]] = [[], [[]], [[1.0], [1.0, 2.0]]]
    for cells in wrong:
        with pytest.raises(ValueError, match="rows of one length"):
            grid(cells, (100, 100))
    with pytest.raises(ValueError, match="one name a row"):
        grid([[1.0]], (100, 100), rows=["a", "b"])
