"""The puzzles of RULER: each a prompt that can be filled to any length, and the wanted strings."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import cycle, islice, pairwise

from regard import zoo

TEXT = "northanger-abbey"
NOISE = (
    *("The grass is green.", "The sky is blue.", "The sun is yellow."),
    *("Here we go.", "There and back again."),
)
ADJECTIVES = (
    *("amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly"),
    *("keen", "lively", "mellow", "narrow", "orange", "proud", "quiet", "rusty", "silent", "tall"),
)
NOUNS = (
    *("anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer", "island"),
    *("jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pencil", "river", "saddle"),
    *("temple", "violin"),
)


@dataclass(frozen=True)
class Puzzle:
    """`prompt(size)` is the question in so many units of filling, the same text for the same size.

    The units are words of the filling, or entries of a list. The answer begins with `prefix`;
    `answers` are the strings it should go on to hold.
    """

    prompt: Callable[[int], str]
    prefix: str
    answers: tuple[str, ...]


# -- needles ---------------------------------------------------------------------------------------
def _needles(
    draw: random.Random, number: int, keys: int, values: int, asked: int, noise: bool
) -> Puzzle:
    """Sentences that give a key its number, at random places; some keys are asked for."""
    names = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    chosen = draw.sample(names, keys)
    drawn = iter(draw.sample(range(1_000_000, 10_000_000), keys * values))
    given = {key: [str(next(drawn)) for _ in range(values)] for key in chosen}
    facts = [
        f"One of the special magic numbers for {key} is: {n}." for key in chosen for n in given[key]
    ]
    draw.shuffle(facts)
    asked_keys = draw.sample(chosen, asked)
    answers = tuple(n for key in asked_keys for n in given[key])
    places = [draw.random() for _ in facts]
    filling = NOISE if noise else _from(draw, _sentences())
    shown = asked_keys[0] if asked == 1 else f"{', '.join(asked_keys[:-1])}, and {asked_keys[-1]}"
    is_one, are_one = len(answers) == 1, keys * values == 1
    what = "number" if is_one else "numbers"
    hidden = "A special magic number is" if are_one else "Some special magic numbers are"

    def prompt(size: int) -> str:
        return (
            f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {'number' if are_one else 'numbers'} afterwards.\n"
            f"{_hide(facts, places, filling, size)}\n"
            f"What {'is' if is_one else 'are all'} the special magic {what} for {shown} mentioned "
            "in the provided text?"
        )

    prefix = (
        f"The special magic {what} for {shown} mentioned in the provided text "
        f"{'is' if is_one else 'are'}"
    )
    return Puzzle(prompt, prefix, answers)


def _chain(draw: random.Random, number: int, hops: int = 4) -> Puzzle:
    """A value handed from variable to variable: which variables hold it?"""
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] if name not in names else []
    value = str(draw.randrange(10_000, 100_000))
    facts = [f"VAR {names[0]} = {value}."]
    facts += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    places = sorted(draw.random() for _ in facts)  # a chain reads from front to back

    def prompt(size: int) -> str:
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{_hide(facts, places, NOISE, size)}\nQuestion: Find all variables that are "
            f"assigned the value {value} in the text above."
        )

    prefix = (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return Puzzle(prompt, prefix, tuple(names))


def _from(draw: random.Random, pieces: Sequence[str]) -> list[str]:
    """The pieces, begun at a random one."""
    start = draw.randrange(len(pieces))
    return [*pieces[start:], *pieces[:start]]


def _cut(pieces: Sequence[str], words: int) -> list[str]:
    """So many words of the pieces, over and over again; the last piece may be cut short."""
    parts: list[str] = []
    for piece in cycle(pieces):
        if words <= 0:
            return parts
        kept_words = piece.split()[:words]
        words -= len(kept_words)
        parts.append(" ".join(kept_words))
    return parts


def _hide(facts: Sequence[str], places: Sequence[float], filling: Sequence[str], words: int) -> str:
    """The facts at their places, 0 the front and 1 the end, between the sentences."""
    sentences = _cut(filling, words)
    at = [int(place * (len(sentences) + 1)) for place in places]
    pieces = [(place, 0, n, fact) for n, (place, fact) in enumerate(zip(at, facts))]
    pieces += [(place, 1, 0, sentence) for place, sentence in enumerate(sentences)]
    return " ".join(piece for *_, piece in sorted(pieces))


# -- counting --------------------------------------------------------------------------------------
def _common_words(draw: random.Random, number: int, common: int = 5, times: int = 10) -> Puzzle:
    """A numbered list: some words often, the filling once each."""
    words = draw.sample(_vocabulary(), len(_vocabulary()))
    often, rest, seed = words[:common], words[common:], draw.random()

    def prompt(size: int) -> str:
        listed = often * times + list(islice(cycle(rest), size))
        random.Random(seed).shuffle(listed)
        context = " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{context}\nQuestion: What are "
            f"the {common} most common words in the above list?"
        )

    prefix = f"Answer: The top {common} words that appear most often in the list are:"
    return Puzzle(prompt, prefix, tuple(often))


LEAST_CODED = 40  # entries below which the third word has no lead over the fourth


def _frequent_words(draw: random.Random, number: int, kinds: int = 40) -> Puzzle:
    """Made-up words whose counts fall with the square of their rank; dots are the first rank."""
    words: list[str] = []
    while len(words) < kinds:
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        words += [word] if word not in words else []
    total, seed = sum(rank**-2.0 for rank in range(1, kinds + 2)), draw.random()

    def prompt(size: int) -> str:
        length, coded = size + LEAST_CODED, list[str]()
        for rank, word in enumerate(["....", *words], 1):
            coded += [word] * round(length * rank**-2.0 / total)
        random.Random(seed).shuffle(coded)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(coded)}\nQuestion: Do not "
            "provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )

    prefix = (
        "Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    return Puzzle(prompt, prefix, tuple(words[:3]))


# -- questions -------------------------------------------------------------------------------------
# question, answer, and words that only the passage with the answer has
QUESTIONS = (
    ("In which county is the village of Fullerton?", "Wiltshire", "the chief of the property"),
    ("What did Mrs. Allen's favourite gown cost a yard?", "nine shillings", "take this pin out"),
    ("What did he give a yard for his sister's gown?", "five shillings", "a prodigious bargain"),
    ("In which town are the good shops that are so far to go?", "Salisbury", "is such a fag"),
    ("What is the name of Mrs. Thorpe's eldest daughter?", "Isabella", "three smart-looking"),
    ("How much did he ask for the curricle-hung carriage?", "fifty guineas", "Curricle-hung"),
    ("Of which college was Jackson, who bid sixty for the gig?", "Oriel", "reckoned a cheap thing"),
    ("To which city would he drive and back for five pounds?", "York", "only get a roll"),
    ("Which castle does Thorpe name beside Kingsweston?", "Blaize", "You croaking fellow"),
    ("Into which street were the Tilneys turning?", "Brock", "when he had overtaken them"),
    ("Which day would suit Miss Tilney as well?", "Tuesday", "caught hold of one hand"),
)


def _passage_question(draw: random.Random, number: int) -> Puzzle:
    """A question on one of several passages; the last of the others may be cut short."""
    question, answer, mark = QUESTIONS[number % len(QUESTIONS)]
    right = next(p for p in _passages() if mark in p)
    others = [p for p in _passages() if answer.casefold() not in p.casefold()]
    draw.shuffle(others)
    place = draw.random()

    def prompt(size: int) -> str:
        passages = _cut(others, size)
        passages.insert(int(place * (len(passages) + 1)), right)
        context = "\n\n".join(f"Document {n}:\n{p}" for n, p in enumerate(passages, 1))
        order = (
            "Answer the question based on the given documents. Only give me the answer and do not "
            "output any other words."
        )
        return (
            f"{order}\n\nThe following are given documents.\n\n{context}\n\n{order}\n\n"
            f"Question: {question}"
        )

    return Puzzle(prompt, "Answer:", (answer,))


# -- the shipped book ------------------------------------------------------------------------------
@lru_cache(1)
def _passages() -> tuple[str, ...]:
    pieces = (" ".join(p.split()) for p in zoo.text(TEXT).split("\n\n"))
    return tuple(p for p in pieces if 150 < len(p) < 600)


@lru_cache(1)
def _sentences() -> tuple[str, ...]:
    pieces = re.split(r"(?<=[.!?])\s+", " ".join(zoo.text(TEXT).split()))
    return tuple(p for p in pieces if 20 < len(p) < 300)


@lru_cache(1)
def _vocabulary() -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,8}\b", zoo.text(TEXT)))))


TASKS: dict[str, Callable[[random.Random, int], Puzzle]] = {
    "single-noise": partial(_needles, keys=1, values=1, asked=1, noise=True),
    "single-text": partial(_needles, keys=1, values=1, asked=1, noise=False),
    "multi-key": partial(_needles, keys=4, values=1, asked=1, noise=False),
    "multi-value": partial(_needles, keys=1, values=4, asked=1, noise=False),
    "multi-query": partial(_needles, keys=4, values=1, asked=4, noise=False),
    "variable-tracking": _chain,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
    "passage-qa": _passage_question,
}
"""The tasks by name; each makes the puzzle of a number with a random generator of its own."""
