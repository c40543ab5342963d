"""The card of ACT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regard.cards import Card, Checked, Paper, setting, whole_numbers

CARD = Card(
    slug="act",
    name="ACT",
    verb="steer",
    does="shrink the harmful sinks of chosen heads while the model runs",
    paper=Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention Calibration",
        "Yu et al.",
        2024,
        "2406.15765",
    ),
    families=("causal LM",),
    method="ACT",
    exports=("heads.HeadFilter",),
    takes="text",
    neutral={"beta": 1.0},
    example={"alpha": 1.0, "skip_layers": (0, 0)},
    examples=(
        'regard run act --prompt "Name three rivers of France."',
        "regard run act --prompt @long.txt --heads heads.json --threshold 0.1",
    ),
)


Heads = Mapping[int, Sequence[int]]


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    beta: float = setting(0.4, "share of its attention a sink keeps", least=0, to=1)
    alpha: float = setting(
        5.0, "a sink receives over alpha / N of N tokens", above=0, excludes="threshold"
    )
    threshold: float | None = setting(
        None, "a sink receives over this, instead of alpha / N", above=0, below=1
    )
    heads: Heads | str | Path | None = setting(
        None, "head list of `regard calibrate act`, a file; all heads without", kind=Path
    )
    keep_first: int = setting(1, "leading tokens whose attention is never reduced", least=0)
    skip_layers: tuple[int, int] = setting(
        (2, 1), "first and last layers left alone without a head list: 2,1", kind=whole_numbers
    )
    mode: str = setting(
        "prefill",
        "while decoding keep the sinks of the prompt, or find them anew",
        among=("prefill", "dynamic"),
    )
    min_rows: int = setting(1, "queries that must see a key before it counts", least=1)
