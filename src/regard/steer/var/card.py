"""The card of VAR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.cards import Card, Checked, Paper, setting, whole_numbers

CARD = Card(
    slug="var",
    name="VAR",
    verb="steer",
    does="give the attention that sink tokens waste back to the image",
    paper=Paper(
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "Kang et al.",
        2025,
        "2503.03321",
    ),
    families=("vision-language",),
    method="VAR",
    exports=("dims.find_sink_dims",),
    takes="picture",
    model="smol-vlm",
    neutral={"move": 0.0},
    example={"dims": (5, 9), "tau": 2.0},
    examples=(
        'regard run var --image photo.png --prompt "What is left of the circle?" --out sinks.png',
        'regard run var --model FOLDER --image a.png --prompt "..." --dims auto --tau 12',
        "regard run var --model llava-hf/llava-1.5-7b-hf --image a.png --prompt @question.txt",
    ),
)
PRESETS = {"general": 0.8, "hallucination": 0.5, "vision-centric": 0.9}
"""The paper's values of `nonsink_ratio`, by task."""


def dims_of(typed: Any) -> Any:
    """Dims as typed: numbers, "auto" or the name of a language model."""
    named = isinstance(typed, str) and not typed.replace(",", "").replace("-", "").isdecimal()
    return typed if named else whole_numbers(typed)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    move: float = setting(0.6, "share of the attention on sinks that is moved", least=0, to=1)
    preset: str = setting("general", "task, which sets nonsink_ratio", among=PRESETS)
    nonsink_ratio: float | None = setting(
        None,
        "least share of a row's image attention on tokens that are no sinks, in place of preset",
        least=0,
        to=1,
    )
    image_mass: float = setting(
        0.2, "least attention on the image of a row that is changed", least=0, to=1
    )
    tau: float = setting(
        20.0,
        "a sink exceeds this in a massive dim, in units of the rms; below sqrt(width)",
        above=0,
    )
    dims: Sequence[int] | str | None = setting(
        None,
        "massive dims such as 1415,2533; auto finds them on the prompt; "
        "those of a known language model when left out",
        kind=dims_of,
    )
    layers: Sequence[int] | None = setting(
        None, "layers that act, such as 0-11; all but the last when left out", kind=whole_numbers
    )
    variant: str = setting(
        "paper",
        "the released code skips layers 0 and 1 and rows without visual sinks",
        among=("paper", "released"),
    )
    heads: str = setting(
        "image-centric",
        "rows that are changed; all is a control: every text row that sees the image",
        among=("image-centric", "all"),
    )
    give: str = setting(
        "image", "who receives; text and both are controls", among=("image", "text", "both")
    )
    random_sinks: int | None = setting(
        None,
        "control: a seed; as many random image tokens in place of the visual sinks",
        whole=True,
    )
    rule: str | None = setting(
        None, "older name of variant", among=("paper", "released_code"), hidden=True
    )
