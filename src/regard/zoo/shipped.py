"""Small models that come with the package: trained by the recipes of `regard.zoo.train`."""

from __future__ import annotations

from pathlib import Path

from regard.errors import InputError

FOLDER = Path(__file__).parent / "weights"
PIPELINES = {
    "shapes-sd": "text to image on drawn scenes, Stable Diffusion's layout",
    "shapes-dit": "text to image on drawn scenes, Stable Diffusion 3's layout",
}
MODELS = {
    "shapes-vlm": "questions about drawn scenes, LLaVA's layout",
    "smol-vlm": "the same with SmolLM2-135M as language body",
}


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the package; None for another name.

    >>> shipped("gpt2") is None
    True

    Raises:
        InputError: a name of ours whose weights are not here.
    """
    known = name.strip().lower()
    if known not in PIPELINES and known not in MODELS:
        return None
    folder = FOLDER / known
    if not (folder / "training.json").is_file():
        raise InputError(
            f"the weights of {known} are not in this installation: install regard again, or train "
            f"them with `regard zoo train {known} --out {folder}`"
        )
    return folder
