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
        "credit.credit_weights",
        "credit.token_credit",
    ),
    takes="answer",
    examples=(
        'regard run preplan-anchor --prompt "Tom has 3 apples and buys 4. How many?" -n 80',
        "regard train grpo --credit coupled --model DIR --env countdown",
    ),
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


CREDITS = (
    "coupled", "local", "global", "uniform", "random", "bottom", "bottom-local", "entropy"
)  # fmt: skip


def number_or_none(typed: Any) -> float | None:
    """A number as typed; "median" and "none" leave the choice to the response."""
    if typed is None or str(typed).strip().lower() in ("none", "median", "quantile"):
        return None
    try:
        return float(typed)
    except ValueError:
        raise InputError(f"{str(typed)[:40]!r} is no number") from None


@dataclass(eq=False)
class CreditSettings(Checked):
    """How tokens of a response are credited; the paper's values where it gives them."""

    credit: str = setting(
        "coupled", "tokens that are amplified: those of the rhythm, or a control", among=CREDITS
    )
    amplify: float = setting(1.5, "weight of an amplified token; 1 is stock GRPO", least=0, to=100)
    top: float = setting(0.4, "share of a response's tokens that are amplified", above=0, to=1)
    alpha: float = setting(
        0.5, "share of an anchor's bonus that moves to its preplan token", least=0, to=1
    )
    lead: int = setting(3, "tokens before an anchor where its preplan token may stand", least=1)
    window: int = setting(10, "tokens at which the look-back is clipped", least=1)
    horizon: tuple[int, int | None] = setting(
        (10, 50),
        "influence comes from so many tokens later; 10,100 in the revision",
        kind=horizon_of,
    )
    quantile: float = setting(0.3, "share of heads that are local, and global", above=0, to=0.5)
    layers: str | Sequence[int] = setting(
        "middle", "layers looked at: middle, all or numbers", kind=layers_of
    )
    low_waad: float | None = setting(
        None, "look-back up to which an anchor hands on; the response's median", kind=number_or_none
    )
    high_change: float | None = setting(
        None,
        "change of look-back from which a token may preplan; that of the top share",
        kind=number_or_none,
    )
    normalize: bool = setting(False, "divide by the mean weight of the response")
    seed: int = setting(0, "of the credit called random", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.horizon
        if low < 0 or (high is not None and high < low):
            raise InputError(
                f"the horizon is (lo, hi) tokens later with 0 <= lo <= hi, not {self.horizon}"
            )
