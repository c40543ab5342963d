"""The card of SwapAnything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting
from regard.errors import InputError

CARD = Card(
    slug="swap-anything",
    name="SwapAnything",
    verb="steer",
    does="replace a masked object with a personal one and leave all other pixels alone",
    paper=Paper(
        "SwapAnything: Enabling Arbitrary Object Swapping in Personalized Visual Editing",
        "Gu et al.",
        2024,
        "2404.05717",
    ),
    families=("UNet diffusion",),
    method="swap",
    exports=("SwapAnything", "objects.swap_object"),
    neutral={"keep": (0.0, 0.0, 0.0, 0.0)},
    example={"steps": 3, "null_steps": 1, "concept_steps": 2},
    examples=(
        'regard run swap-anything --image scene.png --caption "a red circle and a blue square" '
        '--object "red circle" --target "green star" --mask circle.png',
        "regard run swap-anything --image scene.png --object circle --concept my_concept/",
    ),
    model="shapes-sd",
)


def four_shares(text: str | Sequence[float]) -> tuple[float, ...]:
    """Four shares as typed.

    >>> four_shares("1,0.4,0.5,0.2")
    (1.0, 0.4, 0.5, 0.2)
    """
    try:
        shares = tuple(map(float, text.split(",") if isinstance(text, str) else text))
    except (ValueError, TypeError):
        shares = ()
    if len(shares) != 4 or not all(0 <= x <= 1 for x in shares):
        raise InputError(
            f"keep is four shares from 0 to 1, such as 1,0.4,0.5,0.2, not {str(text)[:40]!r}"
        )
    return shares


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    steps: int = setting(20, "denoising steps; the paper takes 50", least=2)
    null_steps: int = setting(10, "updates of the empty prompt a step", least=0)
    concept_steps: int = setting(200, "steps of learning the concept", least=1)
    guidance: float = setting(7.5, "guidance")
    keep: str | Sequence[float] = setting(
        "1,0.4,0.5,0.2",
        "shares of the steps that swap latents, cross maps, self maps, outputs",
        kind=four_shares,
    )
    shape: float = setting(0.0, "strength of scale adaptation", least=0)
    threshold: float = setting(
        0.5, "share of its greatest attention that is inside a guessed mask", least=0, to=1
    )
    soft: bool = setting(True, "widen and soften the mask of latents")
    style: str | None = setting(
        "pooled",
        "mean and spread of latents inside the mask taken from the source, over all channels (as "
        "released) or each",
        among=("pooled", "channels", "none"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep = four_shares(self.keep)
