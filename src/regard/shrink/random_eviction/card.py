"""The card of random rows."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Budget, Card, Paper, setting

CARD = Card(
    slug="random",
    name="random rows",
    verb="shrink",
    does="keep tokens drawn at random: the control",
    paper=Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "Zhang et al.",
        2023,
        "2306.14048",
    ),
    families=("causal LM",),
    method="RandomEviction",
    takes="text",
    plain_prompt=True,
    neutral={"ratio": 1.0},
    example={"ratio": 0.5},
    baseline=True,
)


@dataclass(eq=False)
class Settings(Budget):
    seed: int = setting(0, "seed of the draw", least=0)
