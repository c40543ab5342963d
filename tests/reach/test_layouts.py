"""Every image token is where its family's processor and encoder put it: on the pixels that change
it, on the right picture, under `generate` too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from regard.cli.pictures import ask
from regard.parts.vision import FAMILIES, Images, family, locate, panels
from regard.parts.vision.layouts import unknown
from tests.families import BUILDERS, TABLE, embedded
from tests.families import family as tiny_family

WIDE, HIGH = (600, 260), (260, 600)
BLOCK = 60  # pixels of the side of what is painted
REACH = 3  # pixels of the model that resampling looks at on either side

Blocks = list[tuple[int, int]]


def corners(size: tuple[int, int]) -> Blocks:
    """Two corners and two places inside."""
    wide, high = size
    return [(0, 0), (wide - BLOCK, high - BLOCK), (wide // 3, high // 3), (wide // 2, high // 5)]


def painted(size: tuple[int, int], at: tuple[int, int] | None) -> Image.Image:
    picture = Image.new("RGB", size, (110, 120, 130))
    if at is not None:
        box = (*at, at[0] + BLOCK - 1, at[1] + BLOCK - 1)
        ImageDraw.Draw(picture).rectangle(box, fill=(250, 10, 10))
    return picture


def asked(name: str, model: Any, processor: Any, pictures: list[Image.Image]) -> Any:
    if name != "gemma3":
        return ask(model, processor, pictures, "what is this", 4)
    text = "<boi> " * len(pictures) + "what is this"
    return processor(images=pictures, text=text, return_tensors="pt", do_pan_and_scan=True)


def check(places: Images, changed: Any, size: tuple[int, int], at: tuple[int, int]) -> int:
    """The cells that changed are those that show the block; how many those are."""
    tokens = places.cells(0).tolist()
    offset = count = 0
    for view in places.views[0]:
        for n in range(view.cells):
            token = tokens[offset + n]
            if view.picture != 0:
                assert not changed[token], (view, n)
                continue
            cell = view.cell(n)
            assert cell is not None
            spans = []
            for low, high, edge, start in ((cell[0], cell[2], size[0], at[0]),
                                           (cell[1], cell[3], size[1], at[1])):  # fmt: skip
                spans.append((low * edge, high * edge, start))
            # a cell covers at least one patch of four pixels of the model
            soft = [REACH * (high - low) / 4 for low, high, _ in spans]
            may = all(
                high + s > x and low - s < x + BLOCK for (low, high, x), s in zip(spans, soft)
            )
            must = all(min(high, x + BLOCK) - max(low, x) > 0.3 * min(BLOCK, high - low)
                       for low, high, x in spans)  # fmt: skip
            assert may or not changed[token], (view, n)
            assert changed[token] or not must, (view, n)
            count += must
        offset += view.cells
    assert offset == len(tokens)
    return count


@pytest.mark.parametrize("size", [WIDE, HIGH])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_token_changes_where_its_pixels_do(name: str, size: tuple[int, int]) -> None:
    model, processor = tiny_family(name)
    inputs = asked(name, model, processor, [painted(size, None)])
    places = locate(model, inputs, processor, [size])
    plain = embedded(model, inputs)
    image = inputs["input_ids"][0] == model.config.image_token_id
    assert torch.equal((places.number[0] >= 0) & image, image)
    views = {view.name for view in places.views[0]}
    assert len(views) > 1 or not name.startswith(("idefics3", "smol", "gemma3", "internvl"))
    shown = 0
    for at in corners(size):
        again = embedded(model, asked(name, model, processor, [painted(size, at)]))
        shown += check(places, (again - plain).abs().amax(-1) > 1e-5, size, at)
    assert shown >= len(views) * 2


@pytest.mark.parametrize("name", BUILDERS)
def test_several_pictures_of_other_shapes(name: str) -> None:
    model, processor = tiny_family(name)
    sizes = [WIDE, HIGH]
    inputs = asked(name, model, processor, [painted(size, None) for size in sizes])
    places = locate(model, inputs, processor, sizes)
    assert [view.picture for view in places.views[0]] == sorted(v.picture for v in places.views[0])
    assert {view.picture for view in places.views[0]} == {0, 1}
    at = corners(WIDE)[2]
    changed = asked(name, model, processor, [painted(WIDE, at), painted(HIGH, None)])
    moved = (embedded(model, changed) - embedded(model, inputs)).abs().amax(-1) > 1e-5
    assert check(places, moved, WIDE, at) > 0


@pytest.mark.parametrize("name", BUILDERS)
def test_under_generate_the_cells_are_the_same(name: str) -> None:
    from regard.lab.answers import answer
    from regard.parts.pictures import PictureLooks

    model, processor = tiny_family(name)
    sizes = [WIDE, HIGH]
    inputs = asked(name, model, processor, [painted(size, None) for size in sizes])
    looks = PictureLooks()
    answer(model, inputs, 3, [looks])
    places = locate(model, inputs, processor, sizes)
    assert looks.places.tolist() == places.cells(0).tolist()
    shapes = [(v.image, v.first, v.rows, v.columns) for v in looks.views]
    assert shapes == [(v.image, v.first, v.rows, v.columns) for v in places.views[0]]
    assert all(w.shape[1] == len(looks.places) for w in looks.words.values())


def test_tiles_are_drawn_together() -> None:
    model, processor = tiny_family("idefics3")
    inputs = asked("idefics3", model, processor, [painted(WIDE, None), painted(HIGH, None)])
    drawn = panels(locate(model, inputs).views[0])
    assert [(picture, name) for picture, name, _ in drawn] == [
        (0, "tiles"), (0, "whole"), (1, "tiles"), (1, "whole"),
    ]  # fmt: skip
    assert len(drawn[0][2]) == 8 == len(drawn[2][2])


def test_without_the_processor_the_grids_are_known_and_some_places_are_not() -> None:
    model, processor = tiny_family("internvl")
    inputs = asked("internvl", model, processor, [painted(WIDE, None)])
    views = locate(model, inputs).views[0]
    assert [v.name for v in views] == ["tile 1", "tile 2", "whole"]
    assert [v.box is None for v in views] == [True, True, False]


def test_a_family_that_is_not_in_the_table_has_no_grid() -> None:
    model, processor = tiny_family("idefics3")
    inputs = asked("idefics3", model, processor, [painted(WIDE, None)])
    model.config.model_type = "of tomorrow"
    assert family(model) is unknown and "of tomorrow" not in FAMILIES
    places = locate(model, inputs)
    assert places.views == [[]] and set(places.grids[0]) == {None}
    image = inputs["input_ids"][0] == TABLE["<image>"]
    assert torch.equal(places.number[0] >= 0, image)
    assert places.cells(0).tolist() == image.nonzero()[:, 0].tolist()
