"""Contact sheets: everything has its place, whatever its size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from regard.report.contact import GAP, LABEL, heat, marked, sheet


@pytest.mark.parametrize(("side", "shown"), [(32, 96), (64, 128), (96, 96), (200, 200)])
def test_a_sheet_enlarges_what_is_tiny_by_whole_pixels(side: int, shown: int) -> None:
    colors = [["red", "lime"], ["blue", "gray"]]
    rows = [[Image.new("RGB", (side, side), c) for c in row] for row in colors]
    made = np.asarray(sheet(rows, ["a", "b"], ["one", "two"]))
    for row in colors:
        for color in row:
            own = np.asarray(Image.new("RGB", (1, 1), color))[0, 0]
            assert (made == own).all(-1).sum() == shown**2
    assert made.shape[0] == LABEL + GAP + 2 * (shown + GAP)


def test_columns_make_room_for_their_names() -> None:
    """No name runs into the next: between two names there is a blank column of pixels."""
    names = ["a name that is far longer than its picture is wide", "b"]
    row = [Image.new("RGB", (96, 96), "white")] * 2
    made = np.asarray(sheet([row], names, ["one"]).convert("L"))
    inked = (made[:LABEL] < 200).any(0)
    last = np.flatnonzero(inked)[-1]
    width = next(n for n in range(last, 0, -1) if not inked[n - GAP + 1 : n + 1].any())
    assert inked[:width].any() and last - width < 12  # the last name is the short one alone


def test_a_sheet_refuses_what_does_not_fit() -> None:
    row = [Image.new("RGB", (8, 8))]
    for rows, names, labels in (([], ["a"], []), ([row], ["a", "b"], ["x"]), ([row], ["a"], [])):
        with pytest.raises(ValueError, match="one label a row"):
            sheet(rows, names, labels)


def test_a_point_is_marked_on_a_copy() -> None:
    image = Image.new("L", (64, 48), 255)
    got = np.asarray(marked(image, (20, 30))).astype(int)
    red = got[..., 0] - got[..., 1] > 100
    rows, columns = np.nonzero(red)
    assert red[30, 20] and (rows.mean(), columns.mean()) == (30, 20) and red.sum() < 40
    assert image.getextrema() == (255, 255)
    assert marked(image, (63, 0)).size == (64, 48)


def test_a_flat_map_has_one_colour() -> None:
    flat = np.asarray(heat(np.ones((3, 3)), (6, 6)))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1
