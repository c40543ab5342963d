"""What the commands on diffusion pipelines share: options, seeds, folders, images, pages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cards import DIGITS
from regard.cli.common import err, numbers, working, write_json
from regard.errors import InputError
from regard.files import check_folder
from regard.zoo.options import Loading, placed

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
UNet = Annotated[
    str, typer.Option(help="shapes-sd, or folder or hub id of a StableDiffusionPipeline.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps (the pipeline's own when left out).")
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance (the pipeline's own when left out).")
]
Size = Annotated[
    str | None, typer.Option(help="512, or 768x512 (the pipeline's own when left out).")
]
Seeds = Annotated[str, typer.Option(help="How many seeds, or which: 8, or 0,3,5-7.")]
Json = Annotated[
    Path | None, typer.Option(metavar="FILE|-", help="Write everything as JSON here; - for stdout.")
]


def load(name: str, loading: Loading | None = None) -> Any:
    """A pipeline, with a spinner."""
    with working(f"loading {name}"):
        return (loading or Loading()).pipeline(name)


def finish(
    result: Mapping[str, Any], json: Path | None, lines: Iterable[str], notes: Iterable[str] = ()
) -> None:
    """Write the result where it is asked for, its notes to stderr, and print the lines unless the
    result went to stdout.
    """
    write_json(result, json)
    for note in notes:
        err().print(f"note: {note}", markup=False, highlight=False)
    if str(json) != "-":
        for line in lines:
            print(line)


def loaded_as(model: str, pipe: Any) -> str:
    """The last line of a command: which pipeline, its dtype and device."""
    return f"model: {model}, {placed(pipe)}"


def seeds(given: str) -> list[int]:
    """ "8" is the seeds 0 to 7; "0,3,5-7" names them.

    >>> seeds("3"), seeds("0,3,5-7")
    ([0, 1, 2], [0, 3, 5, 6, 7])
    """
    text = given.strip()
    if text.isdecimal() and not text.strip("0"):
        raise InputError("--seeds needs at least one seed: give 8, or 0,3,5-7")
    if text.isdecimal() and len(text) <= DIGITS:
        text = f"0-{int(text) - 1}"
    elif text.isdecimal():
        raise InputError(f"--seeds {text[:40]!r} is no number of seeds: give 8, or 0,3,5-7")
    chosen = numbers(text, "seeds") or []
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(
            f"--seeds takes a number of seeds, or seeds such as 0,3,5-7, not {given!r}"
        )
    return chosen


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
    path = check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"{path} cannot be made: {problem.strerror}") from None
    return path


def pictures(folder: Path) -> list[Path]:
    """The files of pictures in a folder, by name.

    Raises:
        InputError: there are none.
    """
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not paths:
        raise InputError(f"{folder} holds no pictures ({', '.join(PICTURES)}): put some there")
    return paths


def settings(
    pipe: Any,
    steps: int | None,
    guidance: float | None,
    size: str | None,
    negative: str | None = None,
) -> dict[str, Any]:
    """Arguments of the pipeline's call, and only those that a person gave."""
    known = inspect.signature(type(pipe).__call__).parameters
    keywords: dict[str, Any] = {}
    if steps is not None:
        keywords["num_inference_steps"] = steps
    if guidance is not None:
        if "guidance_scale" not in known:
            raise InputError(f"{type(pipe).__name__} takes no guidance: leave --guidance out")
        if not math.isfinite(guidance):
            raise InputError(f"--guidance is a number, not {guidance}")
        keywords["guidance_scale"] = guidance
    if negative is not None:
        if "negative_prompt" not in known:
            raise InputError(f"{type(pipe).__name__} takes no negative prompt: leave it out")
        keywords["negative_prompt"] = negative
    if size is not None:
        width, _, height = size.lower().partition("x")
        height = height or width
        factor = pipe.vae_scale_factor
        unit = math.lcm(8, factor) if hasattr(pipe, "unet") else 2 * factor
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise InputError(f"--size is 512 or 768x512 (width x height), not {size!r}")
        if int(width) % unit or int(height) % unit:
            raise InputError(f"width and height are multiples of {unit} for this pipeline")
        keywords["width"], keywords["height"] = int(width), int(height)
    return keywords


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


def change(before: Any, after: Any, where: Any = None) -> float:
    """Mean absolute difference of two images, of 1; where a mask says so, and 0 where it is empty.

    >>> from PIL import Image
    >>> change(Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "white"))
    1.0
    """
    import numpy as np

    one, two = (np.asarray(x.convert("RGB"), dtype=np.float64) / 255 for x in (before, after))
    apart = abs(one - two)
    if where is not None:
        apart = apart[where]
    return float(apart.mean()) if apart.size else 0.0


def write_page(
    folder: Path,
    title: str,
    notes: Sequence[str],
    rows: Mapping[str, Sequence[Any]],
    columns: Sequence[str],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write rows of images as `sheet.png` and, with `more` sections of images by caption, as
    `index.html`; the path of the page.
    """
    from regard.files import write_bytes, write_text
    from regard.report.contact import figure, page, png, sheet

    images = list(rows.values())
    write_bytes(folder / "sheet.png", png(sheet(images, columns, list(rows))))
    sections = {name: dict(zip(columns, row)) for name, row in rows.items()} | dict(more or {})
    width = images[0][0].width
    shown = max(128, width) if width < 512 else None
    html = page(
        title,
        notes,
        {s: [figure(one, name, shown) for name, one in row.items()] for s, row in sections.items()},
    )
    write_text(folder / "index.html", html)
    return folder / "index.html"


def write_images(folder: Path, images: Mapping[str, Any]) -> None:
    """Write images by name as PNG files."""
    from regard.files import write_bytes
    from regard.report.contact import png

    for name, one in images.items():
        write_bytes(folder / f"{name}.png", png(one))
