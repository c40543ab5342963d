"""Questions about drawn scenes and their answers as rows of word numbers, made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.zoo.scenes import COLORS, SHAPES

from . import captions
from .captions import NUMBER as CAPTION_NUMBER
from .captions import compact, place_of, relations
from .drawing import DIGITS, Drawn

EXTRA = (
    "what", "how", "many", "are", "thing", "things", "yes", "no", "color", "shape", "where",
    "larger", "than", "describe", "image", "shown", "none", "middle", "?", ".",
)  # fmt: skip
WORDS: tuple[str, ...] = (*captions.WORDS, *EXTRA)
"""Every word of questions and answers; those of captions keep their numbers."""
NUMBER = CAPTION_NUMBER | {w: len(captions.WORDS) + n + 1 for n, w in enumerate(EXTRA)}
KINDS = (
    "existence", "color", "shape", "count", "relation", "neighbour", "place", "comparison",
    "digit", "caption",
)  # fmt: skip
SLOTS = ("existence", "existence", *KINDS[1:], "relation", "count")
"""The kinds of the questions that are asked of one image; what does not fit becomes existence."""
LATER = ("existence", "existence", *KINDS[1:], *("relation",) * 3, "comparison", "comparison")
"""The same for a model that goes on: more of what is learnt last."""
QUESTION, ANSWER = 12, 3  # words at most, but for captions
CAPTION = 22
RELATIONS = ("", "left of", "right of", "above", "below")


@dataclass(frozen=True)
class Asked:
    """One question an image: `question` and `answer` are word numbers, 0 after the end.

    `kind` counts `KINDS`; `probe` is true for a question of existence about a colour and a shape
    that are both there, but not together.
    """

    question: Tensor
    answer: Tensor
    kind: Tensor
    probe: Tensor


def ask(drawn: Drawn, kind: str, generator: Any = None) -> Asked:
    """A question of this kind about each scene; existence where it does not fit.

    >>> from .drawing import sample
    >>> g = torch.Generator().manual_seed(0)
    >>> one = ask(sample(1, things=(2,), generator=g), "count", g)
    >>> spell(one.question[0]), spell(one.answer[0])
    ('how many things are there ?', 'two')
    """
    made = _Maker(drawn, generator)
    question, answer, fits = getattr(made, kind)()
    number = torch.full_like(drawn.count, KINDS.index(kind))
    probe = made.probe
    if not bool(fits.all()):
        other, said, _ = made.existence()
        probe = made.probe & ~fits
        width = max(question.shape[1], other.shape[1])
        question = torch.where(fits[:, None], _wide(question, width), _wide(other, width))
        width = max(answer.shape[1], said.shape[1])
        answer = torch.where(fits[:, None], _wide(answer, width), _wide(said, width))
        number = torch.where(fits, number, 0)
    return Asked(question, answer, number, probe)


def spell(row: Tensor) -> str:
    """The words of one row."""
    return " ".join(WORDS[n - 1] for n in row.tolist() if n)


class _Maker:
    """One question each; every method gives (question, answer, where the question fits)."""

    def __init__(self, drawn: Drawn, generator: Any) -> None:
        self.drawn, self.generator = drawn, generator
        self.device, self.rows = drawn.count.device, len(drawn)
        self.at = torch.arange(self.rows, device=self.device)
        self.cls = drawn.shape.clamp_max(len(SHAPES))
        self.there = drawn.there
        self.probe = torch.zeros(self.rows, dtype=torch.bool, device=self.device)

    # -- helpers -----------------------------------------------------------------------------------
    def coin(self, share: float = 0.5) -> Tensor:
        return torch.rand(self.rows, device=self.device, generator=self.generator) < share

    def any(self, number: int, *more: int) -> Tensor:
        shape = (self.rows, *more)
        return torch.randint(number, shape, device=self.device, generator=self.generator)

    def thing(self, fits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A random thing of each scene among those that fit, and whether there is one."""
        ok = self.there if fits is None else self.there & fits
        chance = torch.rand(ok.shape, device=self.device, generator=self.generator)
        return chance.masked_fill(~ok, -1).argmax(1), ok.any(1)

    def of(self, values: Tensor, n: Tensor) -> Tensor:
        return values[self.at, n]

    def words(self, *parts: str | Tensor) -> Tensor:
        """Rows of words: strings are the same for all, tensors are word numbers."""
        slots: list[Tensor] = []
        for part in parts:
            if isinstance(part, str):
                slots += [torch.full_like(self.at, NUMBER[w]) for w in part.split()]
            else:
                slots.append(part)
        return compact(torch.stack(slots, 1))

    def table(self, words: tuple[str, ...] | list[str]) -> Tensor:
        return torch.tensor([NUMBER[w] if w else 0 for w in words], device=self.device)

    def color_word(self, color: Tensor) -> Tensor:
        return self.table(list(COLORS))[color]

    def shape_word(self, cls: Tensor) -> Tensor:
        return self.table([*SHAPES, "digit"])[cls]

    def named(self, n: Tensor) -> list[Tensor]:
        """Colour and shape of the n-th thing."""
        return [
            self.color_word(self.of(self.drawn.color, n)),
            self.shape_word(self.of(self.cls, n)),
        ]

    def yes(self, true: Tensor) -> Tensor:
        return torch.where(true, NUMBER["yes"], NUMBER["no"])[:, None]

    def has(self, color: Tensor, cls: Tensor) -> Tensor:
        """Whether scenes hold such a thing; `[scenes, ...]`."""
        shape = (*self.there.shape, *(1,) * (color.dim() - 1))
        own_color, own_cls = self.drawn.color.view(shape), self.cls.view(shape)
        alike = (own_color == color[:, None]) & (own_cls == cls[:, None])
        return (alike & self.there.view(shape)).any(1)

    # -- the kinds ---------------------------------------------------------------------------------
    def existence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Half true; of the false ones half take colour and shape of two things that are there."""
        n, _ = self.thing()
        color, cls = self.of(self.drawn.color, n), self.of(self.cls, n)
        colors, kinds = self.any(len(COLORS), 16), self.any(len(SHAPES) + 1, 16)
        absent = ~self.has(colors, kinds)
        first = absent.int().argmax(1)
        other = self.thing()[0]
        mixed = self.of(self.drawn.color, other)
        trick = ~self.has(mixed, cls) & self.coin()
        false_color = torch.where(trick, mixed, colors[self.at, first])
        false_cls = torch.where(trick, cls, kinds[self.at, first])
        true = self.coin()
        self.probe = trick & ~true
        color = torch.where(true, color, false_color)
        cls = torch.where(true, cls, false_cls)
        article = torch.where(color == list(COLORS).index("orange"), NUMBER["an"], NUMBER["a"])
        words = self.words("is there", article, self.color_word(color), self.shape_word(cls), "?")
        return words, self.yes(true), torch.ones_like(true)

    def color(self) -> tuple[Tensor, Tensor, Tensor]:
        n, ok = self.thing(self._alone(self.cls))
        shape, color = self.named(n)[::-1]
        return self.words("what color is the", shape, "?"), color[:, None], ok

    def shape(self) -> tuple[Tensor, Tensor, Tensor]:
        n, ok = self.thing(self._alone(self.drawn.color))
        color, shape = self.named(n)
        return self.words("what shape is the", color, "thing ?"), shape[:, None], ok

    def _alone(self, values: Tensor) -> Tensor:
        """Things that are the only one of their scene with this value."""
        same = (values[:, :, None] == values[:, None]) & self.there[:, None]
        return same.sum(-1) == 1

    def count(self) -> tuple[Tensor, Tensor, Tensor]:
        all_things = self.coin()
        color = torch.where(self.coin(0.7), self.of(self.drawn.color, self.thing()[0]),
                            self.any(len(COLORS)))  # fmt: skip
        some = ((self.drawn.color == color[:, None]) & self.there).sum(1)
        number = torch.where(all_things, self.drawn.count, some)
        word = torch.where(all_things, 0, self.color_word(color))
        answer = self.table(list(DIGITS))[number][:, None]
        return self.words("how many", word, "things are there ?"), answer, self.at >= 0

    def _pair(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two things, how the first stands to the second, and whether that is clear."""
        a, _ = self.thing()
        places = torch.arange(self.there.shape[1], device=self.device)
        b, ok = self.thing(places != a[:, None])
        relation = self._relation(a, b)
        return a, b, relation, ok & (relation > 0)

    def _relation(self, a: Tensor, b: Tensor) -> Tensor:
        two = torch.full_like(self.drawn.count, 2)
        x, y = (torch.stack([self.of(t, a), self.of(t, b)], 1) for t in
                (self.drawn.x, self.drawn.y))  # fmt: skip
        d = self.drawn
        pair = Drawn(d.shape[:, :2], d.color, d.size, d.texture, x, y, d.radius, two,
                     d.background, d.textured)  # fmt: skip
        if pair.shape.shape[1] < 2:
            return torch.zeros_like(two)
        return relations(pair)

    def _relation_words(self, relation: Tensor) -> list[Tensor]:
        first = self.table(["", "left", "right", "above", "below"])[relation]
        return [first, self.table(["", "of", "of", "", ""])[relation]]

    def relation(self) -> tuple[Tensor, Tensor, Tensor]:
        a, b, relation, ok = self._pair()
        true = self.coin()
        opposite = torch.tensor([0, 2, 1, 4, 3], device=self.device)[relation]
        said = torch.where(true, relation, opposite)
        words = self.words(
            "is the", *self.named(a), *self._relation_words(said), "the", *self.named(b), "?"
        )
        return words, self.yes(true), ok

    def neighbour(self) -> tuple[Tensor, Tensor, Tensor]:
        """ "what is left of the red circle ?": only where one thing is."""
        a, b, relation, ok = self._pair()
        count = torch.zeros_like(a)
        for n in range(self.there.shape[1]):
            other = torch.full_like(a, n)
            also = (self._relation(other, b) == relation) & self.there[:, n] & (other != b)
            count += also
        words = self.words("what is", *self._relation_words(relation), "the", *self.named(b), "?")
        return words, torch.stack(self.named(a), 1), ok & (count == 1)

    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        n, _ = self.thing()
        place = torch.zeros_like(n)
        for m in range(self.there.shape[1]):
            place = torch.where(n == m, place_of(self.drawn, m), place)
        answer = self.table(["middle", "left", "right", "top", "bottom"])[place]
        return self.words("where is the", *self.named(n), "?"), answer[:, None], self.at >= 0

    def comparison(self) -> tuple[Tensor, Tensor, Tensor]:
        a, _ = self.thing()
        places = torch.arange(self.there.shape[1], device=self.device)
        b, ok = self.thing(places != a[:, None])
        sizes = self.of(self.drawn.size, a), self.of(self.drawn.size, b)
        plain = (self.of(self.cls, a) < len(SHAPES)) & (self.of(self.cls, b) < len(SHAPES))
        words = self.words("is the", *self.named(a), "larger than the", *self.named(b), "?")
        return words, self.yes(sizes[0] > sizes[1]), ok & plain & (sizes[0] != sizes[1])

    def digit(self) -> tuple[Tensor, Tensor, Tensor]:
        shown = (self.drawn.shape >= len(SHAPES)) & self.there
        value = ((self.drawn.shape - len(SHAPES)) * shown).sum(1).clamp(0, 9)
        word = torch.where(shown.any(1), self.table(list(DIGITS))[value], NUMBER["none"])
        return self.words("what digit is shown ?"), word[:, None], shown.any(1) | self.coin(0.3)

    def caption(self) -> tuple[Tensor, Tensor, Tensor]:
        """All things in order of their place: from left to right."""
        by_place = self.drawn.x.masked_fill(~self.there, 9).argsort(1)
        parts: list[Tensor] = []
        for n in range(self.there.shape[1]):
            here = self.there.gather(1, by_place)[:, n]
            color, shape = self.named(by_place[:, n])
            article = torch.where(color == NUMBER["orange"], NUMBER["an"], NUMBER["a"])
            joint = [torch.full_like(article, NUMBER["and"])] if n else []
            parts += [torch.where(here, t, 0) for t in (*joint, article, color, shape)]
        return self.words("describe the image ."), compact(torch.stack(parts, 1)), self.at >= 0


def _wide(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
