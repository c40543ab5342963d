"""The card of Sink emergence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting, whole_numbers

CARD = Card(
    slug="sink-emergence",
    name="Sink emergence",
    verb="see",
    does="measure attention sinks, and see where they appear, move or vanish",
    paper=Paper(
        "When Attention Sink Emerges in Language Models: An Empirical View",
        "Gu et al.",
        2024,
        "2410.10781",
    ),
    families=(
        "causal LM",
        "any attention",
    ),
    method="sinks",
    exports=("Sinks",),
    takes="tokens",
    examples=("regard run sink-emergence --prompt @northanger-abbey --words 400",),
)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    epsilon: float = setting(
        0.3,
        "a head has a sink where its mean attention on the token exceeds this",
        above=0,
        below=1,
    )
    position: int = setting(0, "which token; 0 is whatever the sequence begins with", least=0)
    layers: Iterable[int] | None = setting(
        None, "layers measured, such as 0-11; all when left out", kind=whole_numbers
    )
    tokens: int | None = setting(
        None,
        "cut every sequence to so many; received attention depends on the length",
        least=2,
        whole=True,
    )
