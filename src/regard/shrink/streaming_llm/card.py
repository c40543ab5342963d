"""The card of StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Budget, Card, Paper, setting

CARD = Card(
    slug="streaming-llm",
    name="StreamingLLM",
    verb="shrink",
    does="keep the first tokens and the most recent ones",
    paper=Paper(
        "Efficient Streaming Language Models with Attention Sinks",
        "Xiao et al.",
        2023,
        "2309.17453",
    ),
    families=("causal LM",),
    method="StreamingLLM",
    takes="text",
    plain_prompt=True,
    neutral={"ratio": 1.0},
    example={"ratio": 0.5},
    baseline=True,
)


@dataclass(eq=False)
class Settings(Budget):
    sinks: int = setting(4, "first tokens kept", least=0)
