"""The card of Dynamic Prompt Learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from regard.cards import Card, Checked, Paper, setting
from regard.errors import InputError

CARD = Card(
    slug="dynamic-prompt-learning",
    name="Dynamic Prompt Learning",
    verb="steer",
    does="relearn the nouns at every step so that attention maps stop leaking, then edit",
    paper=Paper(
        "Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing",
        "Wang et al.",
        2023,
        "2309.15664",
    ),
    families=("UNet diffusion",),
    method="DynamicPromptLearning",
    neutral={"inner_steps": 0},
    example={"inner_steps": 1, "null_steps": 1, "steps": 2},
    examples=(
        "regard run dynamic-prompt-learning --image scene.png "
        '--caption "a red circle and a blue square" --edit "blue square -> green square"',
        "regard run dynamic-prompt-learning --image scene.png "
        '--caption "a red circle and a blue square" --reweight blue=2.0 --nouns circle '
        "--nouns square",
    ),
    model="shapes-sd",
)
PAPER_STEPS = 50  # the targets are written for so many


class _Term(NamedTuple):
    weight: float
    alpha: float
    beta: float


class Term(_Term):
    """One loss: its weight, and its target, `beta * exp(-step / alpha)`, which falls.

    >>> round(Term(1.0, 25, 0.3).target(25, 50), 3), round(Term(1.0, 25, 0.3).target(5, 10), 3)
    (0.11, 0.11)
    """

    def __new__(cls, weight: float, alpha: float, beta: float) -> Term:
        numbers = all(isinstance(x, Real) and math.isfinite(x) for x in (weight, alpha, beta))
        if not numbers or weight < 0 or alpha <= 0:
            raise InputError(
                f"a loss has a weight of 0 or more and an alpha above 0, not {weight}, {alpha}"
            )
        return super().__new__(cls, weight, alpha, beta)

    def target(self, step: int, steps: int) -> float:
        """The value to reach in a step; other numbers of steps than 50 run along the same curve."""
        return self.beta * math.exp(-step * PAPER_STEPS / steps / self.alpha)


BALANCE, DISJOINT, BACKGROUND = Term(1.0, 25, 0.3), Term(0.05, 25, 0.9), Term(0.05, 50, 0.7)
"""The paper's settings of the three losses."""


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    nouns: Sequence[str] | None = setting(
        None,
        'a noun to learn, "circle (2)" for the second of two; repeat; the last word of each noun '
        "phrase when left out",
    )
    inner_steps: int = setting(21, "updates of the nouns a step, at most; in the paper 21", least=0)
    null_steps: int = setting(
        51, "updates of the empty prompt a step, at most; in the paper 51", least=0
    )
    steps: int = setting(50, "steps of inversion and sampling; in the paper 50", least=1)
    guidance: float = setting(7.5, "guidance of sampling")
    balance: Term = setting(BALANCE, "loss of a noun without a place", option="")
    disjoint: Term = setting(DISJOINT, "loss of nouns that overlap", option="")
    background: Term = setting(BACKGROUND, "loss of nouns on the background", option="")
    lr: float = setting(1e-3, "learning rate of the nouns (AdamW, anew each step)", above=0)
    warm_start: bool = setting(
        False, "begin each step's empty prompt with that of the last; the paper does not"
    )
    smooth: bool = setting(True, "blur maps by 3 x 3 before their maximum is taken, as released")
    map_cells: int = setting(
        16 * 16, "tokens of the largest grid of which cross-attention is used", least=1
    )
    self_cells: int = setting(
        32 * 32, "tokens of the largest grid of which self-attention is used", least=1
    )
    clusters: int = setting(5, "clusters of places, for the background", least=2)
    share: float = setting(
        0.2, "a cluster is a noun's above so much of its map's maximum", least=0, below=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("balance", "disjoint", "background"):
            term = getattr(self, name)
            if not isinstance(term, (tuple, list)) or len(term) != 3:
                raise InputError(f"{name} is a Term(weight, alpha, beta), not {str(term)[:40]!r}")
            setattr(self, name, Term(*term))
