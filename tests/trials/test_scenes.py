"""The judge is right on what is drawn, and wrong is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from regard.errors import InputError
from regard.lab.trials.scenes import foreground, judge, overlap, own_accuracy, read
from regard.zoo.scenes import scene


def test_the_judge_is_right_on_scenes_it_was_not_made_with() -> None:
    right = own_accuracy(range(5000, 5060), 64, held_out=None)
    assert min(right[n] for n in ("present", "colors", "shapes", "binding", "place")) >= 0.98
    assert right["mask"] > 0.9 and right["scenes"] == 60


def test_masks_have_the_size_of_the_image() -> None:
    drawn = scene(2, things=(2,))
    for side in (32, 64):
        assert all(f.mask.shape == (side, side) for f in read(drawn.draw(side))[1])


def test_what_is_wrong_is_called_wrong() -> None:
    drawn = next(
        s
        for s in (scene(n, things=(2,)) for n in range(99))
        if s.relation
        and s.things[0].color != s.things[1].color
        and s.things[0].shape != s.things[1].shape
    )
    image = drawn.draw(64)
    assert all(vars(judge(image, drawn)).values())
    a, b = drawn.things
    swapped = replace(drawn, things=(replace(a, color=b.color), replace(b, color=a.color)))
    verdict = judge(image, swapped)
    assert verdict.colors and verdict.shapes and not verdict.binding and not verdict.place
    turned = replace(drawn, things=(b, a))
    assert judge(image, turned).binding and not judge(image, turned).place
    alone = judge(image, replace(drawn, things=(a,)))
    assert not alone.present and not alone.binding
    other = replace(drawn, background="black" if drawn.background != "black" else "white",
                    named=drawn.named | {"background"})  # fmt: skip
    assert not judge(image, other).background


def test_the_foreground_is_what_stands_on_the_ground() -> None:
    drawn = scene(3)
    things = drawn.masks(64).any(0)
    assert overlap(foreground(Image.fromarray(drawn.draw(64))), things) > 0.9
    assert not foreground(Image.new("RGB", (32, 32), "navy")).any()
    assert overlap(things, ~things) == 0 and overlap(things, things) == 1


def test_floats_bytes_and_noise() -> None:
    drawn = scene(5)
    assert judge(drawn.draw(64) / 255.0, drawn) == judge(drawn.draw(64), drawn)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(noise, drawn).binding
    flat = np.full((64, 64, 3), 255, dtype=np.uint8)
    assert read(flat) == ("white", [])
    with pytest.raises(InputError, match="cannot be judged"):
        read(np.zeros((64, 64)))
    with pytest.raises(InputError, match="at least one scene"):
        own_accuracy([])
