"""The card of VisionDrop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regard.cards import Card, Checked, Paper, setting, whole_numbers
from regard.errors import InputError

CARD = Card(
    slug="visiondrop",
    name="VisionDrop",
    verb="shrink",
    does="drop and merge image tokens, judged by how image tokens see each other",
    paper=Paper(
        "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
        "Xu et al.",
        2025,
        "2506.22283",
    ),
    families=("vision-language",),
    method="VisionDrop",
    takes="picture",
    model="shapes-vlm",
    neutral={"ratio": 1.0},
    example={"ratio": 0.4375},
    examples=(
        'regard run visiondrop --image photo.png --prompt "How many circles?" --out kept.png',
        'regard run visiondrop --image a.png --prompt "What is this?" --budget 64 '
        "--model llava-hf/llava-1.5-7b-hf",
    ),
)
Size = tuple[int, int]
RATIO = 0.25  # where nothing is said


def cuts_of(typed: Any) -> Any:
    """Cuts as typed, a layer before its two numbers.

    >>> cuts_of("8:30/5,16:22/4")
    {8: (30, 5), 16: (22, 4)}
    """
    if not isinstance(typed, str):
        return typed
    pairs = [piece.partition(":") for piece in typed.split(",")]
    cuts = {
        int(n): whole_numbers(size) for n, colon, size in pairs if colon and n.strip().isdecimal()
    }
    if len(cuts) < len(pairs):
        raise InputError(f"{typed!r} is no list of cuts such as 8:30/5,16:22/4")
    return cuts


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    budget: int | None = setting(
        None,
        "image tokens of one picture, mean over the layers",
        least=1,
        whole=True,
        excludes="ratio",
    )
    ratio: float | None = setting(
        None,
        f"share of a picture's tokens, mean over the layers; {RATIO:g} when nothing is said",
        above=0,
        to=1,
    )
    encoder: Size | None = setting(
        None,
        "instead, dominant and contextual tokens that the encoder hands on: 42,6",
        kind=whole_numbers,
    )
    cuts: Mapping[int, Size] | None = setting(
        None,
        "instead, dominant and contextual tokens that enter a layer: 8:30/5,16:22/4",
        kind=cuts_of,
    )
    stages: str = setting(
        "progressive",
        "where a budget cuts: in stages, at the encoder alone, or before layer 2 alone",
        among=("progressive", "encoder", "fastv"),
    )
    score: str = setting(
        "visual",
        "who judges a token: image tokens, the last text token, or chance",
        among=("visual", "text", "random"),
    )
    merge: bool = setting(True, "merge the other tokens into a few, do not drop them")
    score_mask: str = setting(
        "causal",
        "mask of the visual score; causal, as released, favours early tokens",
        among=("causal", "bidirectional"),
    )
    positions: str = setting(
        "auto",
        "count the tokens left without gaps, or keep their positions; "
        "auto renumbers where positions are plain numbers",
        among=("auto", "renumber", "keep"),
    )
    keep_cls: bool = setting(True, "hand on the class token at the encoder cut, as released")
    seed: int = setting(0, "seed of the random score", least=0)
    tokens: float | None = setting(
        None, "older name of budget, below 1 of ratio", above=0, hidden=True
    )
