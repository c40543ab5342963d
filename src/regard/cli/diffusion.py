"""What the commands on diffusion pipelines share: seeds, folders, images of one seed each."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard.cli.common import Loading, numbers, working
from regard.errors import InputError


def load(name: str, loading: Loading | None = None) -> Any:
    """A pipeline, with a spinner."""
    with working(f"loading {name}"):
        return (loading or Loading()).pipeline(name)


def seeds(given: str) -> list[int]:
    """ "8" is the seeds 0 to 7; "0,3,5-7" names them.

    >>> seeds("3"), seeds("0,3,5-7")
    ([0, 1, 2], [0, 3, 5, 6, 7])
    """
    text = given.strip()
    if text.isdecimal():
        if int(text) < 1:
            raise InputError("--seeds needs at least one seed: give 8, or 0,3,5-7")
        return list(range(int(text)))
    found = numbers(text, "seeds") or []
    if not found or len(set(found)) < len(found):
        raise InputError(
            f"--seeds takes a number of seeds, or seeds such as 0,3,5-7, not {given!r}"
        )
    return found


def check_prompt(prompt: str) -> str:
    """The prompt, or an error when it says nothing."""
    if not prompt.strip():
        raise InputError("the prompt is empty: say in words what the image should show")
    return prompt


def make_folder(path: Path) -> Path:
    """The output folder, made when it is missing.

    Raises:
        InputError: a file stands there, or the folder cannot be written.
    """
    path = path.expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: name a folder for the images")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"{path} cannot be made: {problem.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: no permission to write there: choose another folder")
    return path


def settings(
    pipe: Any,
    steps: int | None,
    guidance: float | None,
    size: str | None,
    negative: str | None = None,
) -> dict[str, Any]:
    """Arguments of the pipeline's call, and only those that a person gave."""
    known = inspect.signature(type(pipe).__call__).parameters
    made: dict[str, Any] = {}
    if steps is not None:
        made["num_inference_steps"] = steps
    if guidance is not None:
        if "guidance_scale" not in known:
            raise InputError(f"{type(pipe).__name__} takes no guidance: leave --guidance out")
        if not math.isfinite(guidance):
            raise InputError(f"--guidance is a number, not {guidance}")
        made["guidance_scale"] = guidance
    if negative is not None:
        if "negative_prompt" not in known:
            raise InputError(f"{type(pipe).__name__} takes no negative prompt: leave it out")
        made["negative_prompt"] = negative
    if size is not None:
        width, _, height = size.lower().partition("x")
        height = height or width
        factor = pipe.vae_scale_factor
        unit = math.lcm(8, factor) if hasattr(pipe, "unet") else 2 * factor
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise InputError(f"--size is 512 or 768x512 (width x height), not {size!r}")
        if int(width) % unit or int(height) % unit:
            raise InputError(f"width and height are multiples of {unit} for this pipeline")
        made["width"], made["height"] = int(width), int(height)
    return made


def image(pipe: Any, prompt: str, seed: int, keywords: dict[str, Any]) -> Any:
    """One PIL image from the seed's own noise, whatever ran before."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=noise, **keywords).images[0]


def ticking(advance: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that moves a bar."""

    def step(pipe: Any, number: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        advance()
        return given

    return step


def steps_of(pipe: Any, keywords: dict[str, Any]) -> int:
    """How many steps the pipeline will take."""
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return int(keywords.get("num_inference_steps", default))
