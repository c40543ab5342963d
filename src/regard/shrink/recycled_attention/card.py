"""The card of Recycled Attention."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting

CARD = Card(
    slug="recycled-attention",
    name="Recycled Attention",
    verb="shrink",
    does="decode over the tokens that the last full step looked at",
    paper=Paper(
        "Recycled Attention: Efficient inference for long-context language models",
        "Xu et al.",
        2024,
        "2411.05787",
    ),
    families=("causal LM",),
    method="Recycled",
    takes="text",
    plain_prompt=True,
    neutral={"stride": 1},
    example={"budget": 8, "stride": 3},
    examples=(
        'regard run recycled-attention --prompt @long.txt --question "Who wrote the letter?"',
        "regard run recycled-attention --prompt @northanger-abbey --budget 512 --stride 8",
    ),
)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    budget: int = setting(1024, "keys kept for each key head", least=1)
    stride: int = setting(
        16, "every so many written tokens read all keys", least=1, excludes="query_check"
    )
    query_check: int | None = setting(
        None,
        "instead, look at every so many tokens whether the query has changed",
        least=1,
        whole=True,
    )
    threshold: float = setting(
        0.8, "cosine at or below which a query has changed", least=-1, to=1, needs="query_check"
    )
    pool: int | None = setting(
        None,
        "rank by the greatest of so many neighbours, 7 for example",
        least=1,
        odd=True,
        whole=True,
    )
    evict: str = setting(
        "last_full", "whose scores make room for a new key", among=("last_full", "current")
    )
