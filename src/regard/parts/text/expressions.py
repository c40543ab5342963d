"""The words of a referring expression: what it names, what only holds it together, and where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .phrases import Parser, Phrase, noun_phrases

_STOPS = """
i me my mine myself we us our ours ourselves you your yours yourself he him his himself she her
hers herself it its itself they them their theirs themselves who whom whose which what that this
these those there here a an the one ones some any each every other another same such own and or but
nor so yet if than as while because until although of at by for with without about against between
into through during before after to from in out on off over under onto upon is am are was were be
been being do does did doing have has had having can could will would shall should may might must
not no very too just only also then once again both all more most when where why how
"""
STOP_WORDS = frozenset(_STOPS.split())
"""English words that name nothing by themselves."""
# where a place word points, as (right, down); None is the middle
PLACES: dict[str, tuple[int, int] | None] = {
    **dict.fromkeys(("left", "leftmost"), (-1, 0)),
    **dict.fromkeys(("right", "rightmost"), (1, 0)),
    **dict.fromkeys(("top", "upper", "uppermost", "above"), (0, -1)),
    **dict.fromkeys(("bottom", "lower", "lowermost", "below", "beneath"), (0, 1)),
    **dict.fromkeys(("middle", "center", "centre", "central"), None),
}
_JOINTS = """
of at by for with without between into from in on under over onto near behind beside next
and or that which who is are was were has
"""
_ENDS = frozenset(_JOINTS.split())


@dataclass(frozen=True)
class Word:
    """One word of an expression and its characters.

    Attributes:
        content: whether it names something: no stop word, no punctuation.
    """

    text: str
    start: int
    end: int
    content: bool


def words(text: str, stop_words: frozenset[str] = STOP_WORDS) -> list[Word]:
    """Every word and mark of a text, in order.

    >>> [w.text for w in words("the man in the red hat.") if w.content]
    ['man', 'red', 'hat']
    """
    return [
        Word(
            m.group(),
            m.start(),
            m.end(),
            m.group()[0].isalnum() and m.group().lower() not in stop_words,
        )
        for m in re.finditer(r"\w[\w'-]*|[^\w\s]", text)
    ]


def head(text: str, candidates: Sequence[Word], parser: str | Parser) -> list[Word]:
    """The content words of the noun phrase at the head of an expression, without place words.

    The first noun phrase of the parser if the expression begins with it, else the words up to the
    first preposition or place word; all given words when that leaves none.

    >>> text = "the woman left of the red car"
    >>> [w.text for w in head(text, words(text), "rules")]
    ['woman']
    """
    phrases: list[Phrase] = noun_phrases(text, parser)
    first = len(text) - len(text.lstrip())
    end = next((p.end for p in phrases if p.start == first), len(text))
    kept: list[Word] = []
    for word in candidates:
        name = word.text.lower()
        if word.start >= end or (kept and (name in PLACES or name in _ENDS)):
            break
        if word.content and name not in PLACES:
            kept.append(word)
    return kept or [w for w in candidates if w.content]


def places(text: str) -> list[str]:
    """Place words that say where something is, at most one an axis; a verb says nothing.

    >>> places("the blue square on the left"), places("the man who left the room")
    (['left'], [])
    """
    by_axis: dict[str, str] = {}
    for m in re.finditer(r"\w+", text):
        name = m.group().lower()
        if name not in PLACES:
            continue
        # "left the room": what is followed by an object at once is a verb
        verb = name == "left" and re.match(r"\s+(the|a|an|his|her|their|its|my)\b", text[m.end() :])
        if not verb:
            toward = PLACES[name]
            axis = "middle" if toward is None else "across" if toward[0] else "along"
            by_axis.setdefault(axis, name)
    return list(by_axis.values())


def ramp(name: str, height: int, width: int) -> Tensor:
    """Weight from 1 on the side that a place word names to 0 on the other, `[height, width]`.

    The middle is 1 in the centre and falls to 0 at the nearest border.

    >>> ramp("left", 1, 3)
    tensor([[1.0000, 0.5000, 0.0000]])
    """
    x = torch.linspace(0, 1, width) if width > 1 else torch.full((1,), 0.5)
    y = torch.linspace(0, 1, height) if height > 1 else torch.full((1,), 0.5)
    toward = PLACES[name]
    if toward is None:
        return (1 - (2 * y - 1).abs())[:, None] * (1 - (2 * x - 1).abs())
    right, down = toward
    if right:
        return (x if right > 0 else 1 - x).expand(height, width)
    return (y if down > 0 else 1 - y)[:, None].expand(height, width)
