"""The card of Preplan and anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.cards import Card, Checked, Paper, setting, whole_numbers
from regard.errors import InputError

CARD = Card(
    slug="preplan-anchor",
    name="Preplan and anchor",
    verb="see",
    does="read the rhythm of an answer from attention, and credit the tokens that carry it",
    paper=Paper(
        "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization",
        "Li et al.",
        2025,
        "2510.13554",
    ),
    families=("causal LM",),
    method="rhythm",
    exports=(
        "Rhythm",
        "coupling.couplings",
    ),
    takes="answer",
    examples=('regard run preplan-anchor --prompt "Tom has 3 apples and buys 4. How many?" -n 80',),
)


def layers_of(typed: Any) -> Any:
    """Layers as typed: "all", "middle" or numbers."""
    return typed if typed in ("all", "middle") else whole_numbers(typed)


def horizon_of(typed: Any) -> tuple[int, int | None]:
    """Two numbers, or one where there is no end.

    >>> horizon_of("10,50"), horizon_of("0")
    ((10, 50), (0, None))
    """
    low, *high = typed if isinstance(typed, (tuple, list)) else whole_numbers(typed)
    if len(high) > 1:
        raise InputError(f"{typed!r} is no horizon such as 10,50")
    return low, high[0] if high else None


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    layers: str | Sequence[int] = setting(
        "all", "layers compared: all, middle (five of the middle third) or numbers", kind=layers_of
    )
    window: int = setting(10, "tokens at which the look-back is clipped", least=1)
    horizon: tuple[int, int | None] = setting(
        (0, None),
        "influence comes from so many tokens later, such as 10,50; 0 takes all",
        kind=horizon_of,
    )
    quantile: float = setting(
        0.3, "share of heads that are local, global, and receivers", above=0, to=0.5
    )
    receivers: int | None = setting(
        None, "receiver heads, in place of the quantile", least=1, whole=True
    )
    exclude_first: bool = setting(False, "leave the attention on token 0 out")
    tail: int = setting(10, "last tokens left out of the peaks", least=0)
    rule: str = setting(
        "local",
        "peaks: strict local maxima above the median, or the largest",
        among=("local", "top"),
    )
    top: float = setting(0.4, "share of tokens that rule top takes", above=0, to=1)
