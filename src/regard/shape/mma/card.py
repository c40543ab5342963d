"""The card of Modality-mutual attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting, whole_numbers

CARD = Card(
    slug="mma",
    name="Modality-mutual attention",
    verb="shape",
    does="let image tokens look at the question",
    paper=Paper(
        "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
        "Wang et al.",
        2025,
        "2503.02597",
    ),
    families=("vision-language",),
    method="MMA",
    exports=("roles.Roles", "roles.mma_mask"),
    takes="picture",
    model="shapes-vlm",
    neutral={"layers": ()},
    example={"form": "merge"},
    examples=('regard run mma --model FOLDER --image photo.png --prompt "What is in the corner?"',),
)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    marker: int | Sequence[int] | None = setting(
        None,
        "token ids of the assistant's role, where an answer begins; when left out, answers are what "
        "labels mark and what the model writes",
        kind=whole_numbers,
    )
    user: int | Sequence[int] | None = setting(
        None,
        "token ids that begin a user's turn and end an answer; when left out, nothing after the "
        "first marker is open",
        kind=whole_numbers,
        needs="marker",
    )
    turns: str = setting(
        "first",
        "an image sees the question of its own turn, or those of later turns too",
        among=("first", "all"),
    )
    mutual: str = setting(
        "image_to_text",
        "both: text may look at later images of its turn too",
        among=("image_to_text", "both"),
    )
    layers: Sequence[int] | None = setting(
        None, "layers that act, such as 0-11; all when left out", kind=whole_numbers
    )
    variant: str = setting(
        "paper",
        "the released code opens the first token of the marker too",
        among=("paper", "released"),
    )
    form: str = setting(
        "merge",
        "merge adds the State of the rectangle; mask goes through transformers' own masks",
        among=("merge", "mask"),
    )
    rule: str | None = setting(
        None, "older name of variant", among=("paper", "released_code"), hidden=True
    )
