"""Captions of drawn scenes as rows of word numbers, made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.zoo.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES
from regard.zoo.scenes import WORDS as SCENE_WORDS

from .drawing import DIGITS, Drawn

LENGTH = 32  # tokens of a text encoder
FILLERS = ("the", "with", "to", "at", "in", "top", "bottom", "picture", "there", "is", "side", "it")
OPENINGS = (("there", "is"), ("a", "picture", "of"), ("a", "picture", "with"))
WORDS: tuple[str, ...] = tuple(dict.fromkeys([*SCENE_WORDS, *FILLERS, "digit", *DIGITS]))
"""Every word that a caption or a question's scene part can hold; word number 0 is no word."""
NUMBER = {word: n + 1 for n, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Style:
    """How captions are worded, as shares of captions.

    Attributes:
        the: definite articles. openings: a phrase such as "a picture of" before.
        part: only some of the things are named. place: a single named thing's place is said.
    """

    the: float = 0.0
    openings: float = 0.0
    part: float = 0.0
    place: float = 0.0


PLAIN = Style()
SPOKEN = Style(the=0.35, openings=0.3, part=0.4, place=0.5)


def write(drawn: Drawn, style: Style = PLAIN, generator: Any = None) -> Tensor:
    """Word numbers of one caption a scene, `[scenes, words]`, 0 after the end.

    The wording is that of `Scene.caption`: sizes, textures, relation and background are named in
    some captions, a texture in each whose things may have one.

    >>> from .drawing import sample
    >>> g = torch.Generator().manual_seed(0)
    >>> rows = write(sample(2, things=(2,), generator=g), generator=g)
    >>> all(spell(row).startswith("a") for row in rows)
    True
    """
    device = drawn.count.device
    rows = len(drawn)

    def chance(share: float) -> Tensor:
        return torch.rand(rows, device=device, generator=generator) < share

    named = drawn.count
    if style.part:
        fewer = 1 + (torch.rand(rows, device=device, generator=generator) * named).long()
        named = torch.where(chance(style.part), torch.minimum(fewer, named), named)
    slots: list[Tensor] = []
    if style.openings:
        which = torch.randint(len(OPENINGS), (rows,), device=device, generator=generator)
        has = chance(style.openings)
        for n in range(3):
            word = _words([o[n] if n < len(o) else None for o in OPENINGS], device)[which]
            slots.append(torch.where(has, word, 0))
    sized, definite = chance(0.5), chance(style.the)
    textured = drawn.textured
    relation = relations(drawn)
    related = (named == 2) & (relation > 0) & chance(0.7 if not style.part else 0.85)
    for n in range(drawn.shape.shape[1]):
        here = named > n
        if n:
            joint = [torch.where(related, t, 0) for t in _relation_words(relation)]
            if n > 1:
                joint = [torch.zeros_like(t) for t in joint]
            alone = here & ~related if n == 1 else here
            joint[0] = torch.where(alone, NUMBER["and"], joint[0])
            slots += [torch.where(here, t, 0) for t in joint]
        slots += [torch.where(here, t, 0) for t in phrase(drawn, n, sized, textured, definite)]
    if style.place:
        said = (named == 1) & chance(style.place)
        slots += [torch.where(said, t, 0) for t in places(drawn, 0)]
    ground = chance(0.8 if not style.part else 0.5)
    color = _words(list(BACKGROUNDS), device)[drawn.background]
    slots += [torch.where(ground, NUMBER[w], 0) for w in ("on", "a")]
    slots += [torch.where(ground, color, 0), torch.where(ground, NUMBER["background"], 0)]
    return compact(torch.stack(slots, 1))


def phrase(
    drawn: Drawn, n: int, sized: Tensor, textured: Tensor, definite: Tensor | None = None
) -> list[Tensor]:
    """Words for the n-th thing: article, size, texture, colour, shape; 0 where one is not said."""
    device = drawn.count.device
    size = torch.where(sized, _words(list(SIZES), device)[drawn.size[:, n]], 0)
    texture = torch.where(textured, _words(list(TEXTURES), device)[drawn.texture[:, n]], 0)
    color = _words(list(COLORS), device)[drawn.color[:, n]]
    shape = _words([*SHAPES, *["digit"] * 10], device)[drawn.shape[:, n]]
    bare = (size == 0) & (texture == 0) & (color == NUMBER["orange"])
    article = torch.where(bare, NUMBER["an"], NUMBER["a"])
    if definite is not None:
        article = torch.where(definite, NUMBER["the"], article)
    return [article, size, texture, color, shape]


def relations(drawn: Drawn, a: int = 0, b: int = 1) -> Tensor:
    """How the a-th thing stands to the b-th: 1 left of, 2 right of, 3 above, 4 below, 0 unclear."""
    if drawn.shape.shape[1] <= max(a, b):
        return torch.zeros_like(drawn.count)
    right, down = drawn.x[:, a] - drawn.x[:, b], drawn.y[:, a] - drawn.y[:, b]
    far, near = torch.maximum(right.abs(), down.abs()), torch.minimum(right.abs(), down.abs())
    across = torch.where(right > 0, 2, 1)
    along = torch.where(down > 0, 4, 3)
    found = torch.where(right.abs() > down.abs(), across, along)
    return torch.where((far >= 1.3 * near) & (drawn.count > max(a, b)), found, 0)


def _relation_words(relation: Tensor) -> list[Tensor]:
    first = _words([None, "left", "right", "above", "below"], relation.device)[relation]
    second = _words([None, "of", "of", None, None], relation.device)[relation]
    return [first, second]


def places(drawn: Drawn, n: int) -> list[Tensor]:
    """ "on the left", "on the right", "at the top", "at the bottom", or nothing in the middle."""
    place = place_of(drawn, n)
    device = place.device
    return [
        _words([None, "on", "on", "at", "at"], device)[place],
        _words([None, "the", "the", "the", "the"], device)[place],
        _words([None, "left", "right", "top", "bottom"], device)[place],
    ]


def place_of(drawn: Drawn, n: int) -> Tensor:
    """1 left, 2 right, 3 top, 4 bottom, 0 middle: by the larger distance from the centre."""
    right, down = drawn.x[:, n] - 0.5, drawn.y[:, n] - 0.5
    found = torch.where(
        right.abs() > down.abs(), torch.where(right > 0, 2, 1), torch.where(down > 0, 4, 3)
    )
    return torch.where(torch.maximum(right.abs(), down.abs()) > 0.12, found, 0)


def compact(slots: Tensor) -> Tensor:
    """Words moved to the front of each row, in order; zeros behind."""
    order = (slots == 0).to(torch.int8).argsort(stable=True, dim=1)
    return slots.gather(1, order)


def spell(row: Tensor) -> str:
    """The words of one row."""
    return " ".join(WORDS[n - 1] for n in row.tolist() if n)


def _words(words: list[str | None] | list[str], device: Any) -> Tensor:
    return torch.tensor([NUMBER[w] if w else 0 for w in words], device=device)
