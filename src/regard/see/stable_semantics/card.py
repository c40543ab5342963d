"""The card of StableSemantics."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting
from regard.parts.text.phrases import PARSERS

CARD = Card(
    slug="stable-semantics",
    name="StableSemantics",
    verb="see",
    does="build data of prompts, images and one attention map per noun phrase",
    paper=Paper(
        "StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations in Naturalistic Images",
        "Zawar et al.",
        2024,
        "2406.13735",
    ),
    families=(
        "UNet diffusion",
        "DiT diffusion",
    ),
    method="ChunkMaps",
    exports=("Recipe",),
    example={"images": 2, "batch": 2, "steps": 1, "grid": 8, "parser": "rules", "captions": 2},
    examples=(
        "regard build stable-semantics --model shapes-sd --prompts prompts.txt --out dataset "
        "--images-per-prompt 4 --steps 15",
    ),
    model="shapes-sd",
)


@dataclass(eq=False)
class Settings(Checked):
    """What a build is made of; the same recipe and pipeline give the same rows.

    >>> import regard
    >>> regard.Recipe(images=4, steps=15).grid
    64
    """

    images: int = setting(10, "images of each caption", least=1, option="images-per-prompt")
    batch: int = setting(5, "images drawn together", least=1)
    steps: int | None = setting(
        None, "denoising steps, the pipeline's own when left out", least=1, whole=True
    )
    guidance: float | None = setting(None, "guidance, the pipeline's own when left out")
    grid: int = setting(64, "longer side of the stored maps", least=1)
    resize: str = setting(
        "bicubic",
        "how maps are resized; bicubic is clamped at 0, as in DAAM",
        among=("bicubic", "bilinear", "area"),
    )
    finest: bool = setting(False, "average the layers of finest resolution alone")
    average: str = setting(
        "words",
        "a chunk's map is the mean over its words, each over its tokens, or over all tokens",
        among=("words", "tokens"),
    )
    parser: str = setting("spacy", "what finds noun chunks", among=PARSERS)
    captions: int = setting(20, "captions in a shard", least=1, option="shard")
    seed: int = setting(0, "moves all seeds together")
