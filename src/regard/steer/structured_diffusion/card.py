"""The card of Structured Diffusion Guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting
from regard.parts.text.phrases import PARSERS, Parser

CARD = Card(
    slug="structured-diffusion",
    name="Structured Diffusion Guidance",
    verb="steer",
    does="give each noun phrase its own encoding, so colours stay on their objects",
    paper=Paper(
        "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis",
        "Feng et al.",
        2022,
        "2212.05032",
    ),
    families=("UNet diffusion",),
    method="StructuredDiffusion",
    neutral={"phrases": ()},
    example={"parser": "rules"},
    examples=(
        'regard run structured-diffusion "a red car and a white sheep" --seeds 8 --out cars',
        'regard run structured-diffusion "a red car and a white sheep" --model path/to/pipeline '
        '--phrase "a red car" --phrase "a white sheep"',
    ),
    model="shapes-sd",
)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    parser: str | Parser = setting(
        "spacy", "what finds the noun phrases", among=PARSERS, function=True
    )
    phrases: Sequence[str] | None = setting(
        None, "a phrase of the prompt, in place of a parser; repeat", option="phrase"
    )
    conjunction: bool = setting(
        False, 'for "A and B": one set of keys a phrase over values with all phrases replaced'
    )
    fused: bool = setting(
        True, "one attention over the mean of the values, in place of one a phrase", option=""
    )
    variant: str = setting(
        "paper",
        "first keys of a conjunction from the prompt, or as released from the phrases",
        among=("paper", "released"),
    )
