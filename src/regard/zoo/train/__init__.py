"""The recipes of the small models that come with the package.

`regard zoo train NAME` runs one; a recipe is boxed by the clock, saves as it goes and writes a
record of what it did beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from regard.errors import InputError, nearest

RECIPES = {
    "shapes-vae": "regard.zoo.train.coder:train_vae",
    "shapes-decoder": "regard.zoo.train.coder:train_decoder",
    "shapes-sd": "regard.zoo.train.diffusion:train_sd",
    "shapes-dit": "regard.zoo.train.diffusion:train_dit",
    "shapes-tower": "regard.zoo.train.vlm:train_tower",
    "shapes-vlm": "regard.zoo.train.vlm:train_vlm",
    "smol-vlm": "regard.zoo.train.vlm:train_smol",
}
TAKES: dict[str, tuple[str, ...]] = {
    "shapes-vae": ("start",),
    "shapes-decoder": ("vae",),
    "shapes-sd": ("vae", "start"),
    "shapes-dit": ("vae", "start"),
    "shapes-vlm": ("tower", "start"),
    "smol-vlm": ("tower",),
}
"""The folders that a recipe builds on, by the names of their options."""


def recipe(name: str) -> Callable[..., dict[str, Any]]:
    """The function that trains `name`.

    Raises:
        InputError: no such recipe.
    """
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}.{nearest(name, RECIPES)}")
    module, _, function = RECIPES[name].partition(":")
    found: Callable[..., dict[str, Any]] = getattr(import_module(module), function)
    return found
