"""The card of H2O."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Budget, Card, Paper, setting

CARD = Card(
    slug="h2o",
    name="H2O",
    verb="shrink",
    does="keep recent tokens and those that received most attention",
    paper=Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "Zhang et al.",
        2023,
        "2306.14048",
    ),
    families=("causal LM",),
    method="H2O",
    takes="text",
    plain_prompt=True,
    neutral={"ratio": 1.0},
    example={"ratio": 0.5},
    baseline=True,
)


@dataclass(eq=False)
class Settings(Budget):
    recent: float = setting(0.5, "share of the rows kept for recent tokens", least=0, to=1)
