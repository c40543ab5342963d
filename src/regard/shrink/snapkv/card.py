"""The card of SnapKV."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Budget, Card, Paper, setting

CARD = Card(
    slug="snapkv",
    name="SnapKV",
    verb="shrink",
    does="keep the tokens that the end of the prompt looks at",
    paper=Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        "Li et al.",
        2024,
        "2404.14469",
    ),
    families=("causal LM",),
    method="SnapKV",
    takes="text",
    plain_prompt=True,
    neutral={"ratio": 1.0},
    example={"ratio": 0.5},
    baseline=True,
)


@dataclass(eq=False)
class Settings(Budget):
    window: int = setting(32, "last queries that rank the tokens, and are kept", least=1)
    pool: int = setting(7, "neighbours over which scores are averaged", least=1, odd=True)
