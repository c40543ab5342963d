"""The card of Task-KV."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting, whole_or_all

CARD = Card(
    slug="task-kv",
    name="Task-KV",
    verb="shrink",
    does="keep the whole cache only for heads that say something different",
    paper=Paper(
        "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
        "He et al.",
        2025,
        "2501.15113",
    ),
    families=(
        "causal LM",
        "vision-language",
    ),
    method="TaskKV",
    takes="text",
    plain_prompt=True,
    neutral={"ratio": 1.0},
    example={"ratio": 0.8, "sinks": 2, "recent": 4, "window": 4},
    examples=(
        'regard run task-kv --ratio 0.4 --prompt @long.txt --question "Who wrote the letter?"',
        'regard run task-kv --prompt @northanger-abbey --words 1200 --question "Who is the heroine?"',
    ),
)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    ratio: float = setting(
        0.4, "share of keys and values kept, of all heads and tokens", above=0, to=1
    )
    beta: float = setting(0.25, "share of full heads in the first layer", above=0, to=1)
    m: int | None = setting(
        None,
        "full heads in the last layer; an eighth of the key heads when left out",
        least=0,
        whole=True,
    )
    window: int = setting(32, "queries at the end of the prompt that say what matters", least=1)
    pool: int = setting(
        7, "neighbours over which attention is averaged to rank tokens", least=1, odd=True
    )
    top: int | None = setting(
        256,
        "tokens of the semantic vector; 0 takes them all",
        least=1,
        whole=True,
        kind=whole_or_all,
    )
    sinks: int = setting(16, "first tokens that every head keeps", least=0)
    recent: int = setting(256, "last tokens that every head keeps", least=0)
    nearest: int = setting(1, "full heads that are the nearest to the mean of the layer", least=0)
    distance: str = setting(
        "euclidean", "distance of a head from the mean of the layer", among=("euclidean", "cosine")
    )
