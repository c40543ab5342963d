"""The card of RefAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from regard.cards import Card, Checked, Paper, setting, whole_numbers
from regard.parts.text.phrases import PARSERS, Parser

MAGNETS = ("with", "to", "pink")
Segmenter = Callable[[Any, tuple[int, int]], Any]

CARD = Card(
    slug="refam",
    name="RefAM",
    verb="see",
    does="point at what a phrase refers to, from a diffusion transformer's attention",
    paper=Paper(
        "RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
        "Kukleva et al.",
        2025,
        "2509.22650",
    ),
    families=("DiT diffusion",),
    method="RefAM",
    example={"parser": "rules"},
    examples=(
        'regard run refam "the small blue square on the left" --image scene.png --mask mask.png',
        'regard run refam "the man in the red hat" --image street.jpg --segmenter sam '
        "--html page.html --model black-forest-labs/FLUX.1-schnell",
    ),
    model="shapes-dit",
)


def words_of(text: str | Sequence[str]) -> tuple[str, ...]:
    """Words as typed, with spaces or commas between them.

    >>> words_of("with, to")
    ('with', 'to')
    """
    return tuple(text.replace(",", " ").split() if isinstance(text, str) else text)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    magnets: Sequence[str] = setting(
        MAGNETS, 'stop words put behind the expression; "" for none', kind=words_of
    )
    stop_words: frozenset[str] | None = setting(
        None, "words that are not summed; English stop words if None", option=""
    )
    noise: float = setting(0.5, "time of the noised image", above=0, below=1)
    draws: int = setting(1, "noises to average", least=1)
    layers: Sequence[int] | None = setting(
        None, "layers to average, such as 2,4-7; the last 60 % when left out", kind=whole_numbers
    )
    gas: str = setting(
        "suppress",
        "leave global attention sinks, take them out of the softmax, or draw one on a content "
        "word to a magnet in front",
        among=("off", "suppress", "redirect"),
    )
    kappa: float = setting(
        10.0, "a sink receives over so many times the median token's attention", above=0
    )
    gamma: float = setting(
        1.0, "a sink's standard deviation over queries is below so many times its mean", above=0
    )
    noun_phrase: bool = setting(True, "sum only the noun phrase at the head of the expression")
    spatial_bias: bool = setting(True, "weight the map by left, right, top ... (English)")
    normalise: str = setting(
        "pixel",
        "softmax over the words of each pixel, or over the pixels of each word",
        among=("pixel", "word"),
    )
    padding: bool = setting(False, "keep padding in the softmax, to compare with")
    segmenter: str | Segmenter = setting(
        "threshold",
        "what makes the mask from the point",
        among=("threshold", "sam", "sam2"),
        function=True,
    )
    threshold: float = setting(0.5, "share of the greatest heat that is inside", above=0, to=1)
    parser: str | Parser | None = setting(
        None,
        "what finds the noun phrase, spacy if it is installed, else rules",
        among=PARSERS,
        function=True,
    )
    seed: int = setting(0, "seed of the noise")
