"""A swap from the picture on: words of the caption, inversion, mask, and the swap itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.parts.diffusion.inversion import invert, null_text
from regard.parts.diffusion.prompt_to_prompt import span_columns, word_span

from . import concepts
from .card import Settings, four_shares
from .method import Steps, Swapped, swap
from .shape import object_mask

PASSES = 3  # how often every step is gone through: inversion, null-text inversion, swap


@dataclass(frozen=True)
class Wording:
    """The prompts of a swap, the characters of the object in both, and the word that stands for a
    concept.
    """

    source: str
    target: str
    old: tuple[int, int]
    new: tuple[int, int]
    word: str


def wording(caption: str, old: str, new: str | None = None, insert: bool = False) -> Wording:
    """What source and target say; without `new` the object's own word stands for a concept.

    >>> wording("a red circle and a star", "red circle", "dog").target
    'a dog and a star'

    Raises:
        InputError: the caption does not have the object, or has it more than once.
    """
    if insert:
        return Wording(caption, f"a {new}", (2, 2), (2, 2 + len(new or "")), old)
    start, end = word_span(caption, old)
    word = caption[start:end].split()[-1]
    if new is None:
        return Wording(caption, caption, (start, end), (start, end), word)
    target = caption[:start] + new + caption[end:]
    return Wording(caption, target, (start, end), (start, start + len(new)), word)


def side_of(pipe: Any) -> int:
    """Pixels of a side of the pictures that the pipeline was made for."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def swap_object(
    pipe: Any,
    picture: Any,
    caption: str,
    old: str,
    new: str | None = None,
    *,
    mask: Any = None,
    insert: bool = False,
    concept: Tensor | None = None,
    settings: Settings | None = None,
    progress: Callable[[], None] | None = None,
) -> Swapped:
    """Swap an object of a PIL image.

    Args:
        caption: what it shows; old: the words of the object in it; new: what comes in its place.
        mask: a PIL image, white where the object is; guessed from attention if None.
        insert: put the new object where the mask is, in place of nothing.
        concept: a vector from `concepts.learn` for the last word of `old`, in place of `new`.
        progress: called after each step, `PASSES` times the number of steps.

    >>> import regard
    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, picture = tiny_pipeline("sd"), Image.new("RGB", (32, 32), "red")
    >>> quick = Settings(steps=2, null_steps=1)
    >>> swapped = regard.swap_object(pipe, picture, "a circle", "circle", "star", settings=quick)
    >>> swapped.image.size
    (32, 32)
    """
    import numpy as np

    given, words = settings or Settings(), wording(caption, old, new, insert)
    side = side_of(pipe)
    small = picture.convert("RGB").resize((side, side))
    embeds = None
    if concept is not None:
        embeds = concepts.encode(pipe, words.target, words.word, concept).detach()
    shape_words = span_columns(pipe.tokenizer, words.target, *words.new)
    inverted = invert(pipe, small, words.source, steps=given.steps, progress=progress)
    nulls = null_text(
        pipe, inverted, guidance=given.guidance, inner_steps=given.null_steps, progress=progress
    )
    if mask is None:
        columns = span_columns(pipe.tokenizer, words.source, *words.old)
        area = object_mask(pipe, inverted, nulls, columns, given.threshold, given.guidance)
    else:
        area = torch.from_numpy(np.asarray(mask.resize((side, side)), dtype=np.float32) / 255)
    return swap(
        pipe, inverted, nulls, area, words.target,
        steps=Steps.shares(four_shares(given.keep), given.steps), embeds=embeds, soft=given.soft,
        style=given.style, guidance=given.guidance, shape=given.shape, shape_words=shape_words,
        progress=progress,
    )  # fmt: skip
