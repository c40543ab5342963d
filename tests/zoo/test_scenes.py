"""Scenes follow from their number, captions say what is drawn, held-out pairs stay out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from regard.errors import InputError
from regard.zoo.scenes import COLORS, SHAPES, WORDS, is_held_out, scene

NUMBERS = range(120)


def test_a_scene_follows_from_its_number() -> None:
    assert all(scene(n) == scene(n) for n in range(10))
    assert np.array_equal(scene(7).draw(32), scene(7).draw(32))
    assert len({scene(n).caption() for n in NUMBERS}) > 100


def test_held_out_pairs() -> None:
    def pairs(held_out: bool | None) -> list[set[tuple[str, str]]]:
        return [{(t.color, t.shape) for t in scene(n, held_out=held_out).things} for n in NUMBERS]

    assert not any(is_held_out(*pair) for one in pairs(False) for pair in one)
    assert all(any(is_held_out(*pair) for pair in one) for one in pairs(True))
    # every colour and every shape is met in training
    seen = set().union(*pairs(False))
    assert {c for c, _ in seen} == set(COLORS) and {s for _, s in seen} == set(SHAPES)


def test_captions_say_what_is_drawn() -> None:
    for n in NUMBERS:
        drawn = scene(n, textures=0.3)
        words = drawn.caption().split()
        assert set(words) <= set(WORDS)
        assert all(phrase in drawn.caption() for phrase in drawn.phrases())
        for one, other in pairwise(words):
            if one in ("a", "an"):
                assert (one == "an") == (other[0] in "aeiou")
        if drawn.relation:
            first, second = drawn.things
            gap = {
                "left of": second.x - first.x,
                "right of": first.x - second.x,
                "above": second.y - first.y,
                "below": first.y - second.y,
            }
            assert gap[drawn.relation] > 0


@pytest.mark.parametrize("side", [32, 50])
def test_masks_are_where_the_colour_is(side: int) -> None:
    for n in range(30):
        drawn = scene(n, things=(1, 2, 3))
        image, masks = drawn.draw(side).astype(float), drawn.masks(side)
        assert masks.shape == (len(drawn.things), side, side)
        assert masks.sum(0).max() == 1 and masks.any((1, 2)).all()
        for thing, mask in zip(drawn.things, masks):
            own = np.asarray(COLORS[thing.color], dtype=float)
            near = np.linalg.norm(image - own, axis=-1) < 1
            assert not (near & ~mask & ~np.delete(masks, drawn.things.index(thing), 0).any(0)).any()
            assert (near & mask).sum() > 0.3 * mask.sum()


def test_bad_input() -> None:
    for settings in ({"shapes": ["blob"]}, {"colors": []}, {"things": (0,)}, {"things": (9,)}):
        with pytest.raises(InputError):
            scene(0, **settings)
    with pytest.raises(InputError, match="no such scene"):
        scene(0, shapes=["circle"], colors=["green"], held_out=True)
    with pytest.raises(InputError, match="at least 16"):
        scene(0).draw(8)
