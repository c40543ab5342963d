"""regard run structured-diffusion: plain and structured images of the same seeds, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import check_output
from regard.files import check_folder
from regard.zoo.options import Loading, placed

from .card import Settings

NAMES = ("plain", "structured")


def run(
    prompt: Annotated[str, typer.Argument(help="What the image should show.")],
    settings: Settings,
    loading: Loading,
    model: diffusion.UNet = "shapes-sd",
    seeds: diffusion.Seeds = "4",
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder for the images, the contact sheet and the page."
        ),
    ] = Path("structured-diffusion"),
    steps: diffusion.Steps = None,
    guidance: diffusion.Guidance = None,
    size: diffusion.Size = None,
    json: diffusion.Json = None,
) -> None:
    """Structured Diffusion Guidance: each noun phrase of the prompt keeps its own text encoding.

    Writes every image, a contact sheet (sheet.png) and a page (index.html) with the plain model
    beside it, from the same noise. The effect is an average over seeds: look at several.
    """
    from regard.lab.answers import noted
    from regard.watching import apply

    from .method import StructuredDiffusion

    diffusion.check_prompt(prompt)
    chosen = diffusion.seeds(seeds)
    method = StructuredDiffusion(**settings.settings())
    method.find(prompt)  # a phrase that the prompt lacks is refused before the model is loaded
    check_output(json)
    check_folder(out)
    pipe = diffusion.load(model, loading)
    keywords = diffusion.settings(pipe, steps, guidance, size)
    apply(pipe, method)  # refuses a pipeline that it cannot act on
    folder = diffusion.make_folder(out)
    with noted("StructuredDiffusion") as notes:
        pairs, seconds = _images(pipe, prompt, chosen, keywords, method)
    result = {
        **method.report()["prompts"][0],
        "seeds": chosen,
        "change": [diffusion.change(*pair) for pair in pairs],
        "seconds": seconds,
        "settings": {"model": model, **settings.settings(), **keywords},
        "loaded": placed(pipe),
        "notes": notes,
    }
    page = _write(folder, result, pairs)
    lines = [
        f"phrases: {', '.join(map(repr, result['phrases'])) or 'none'}",
        *(
            f"seed {n}: mean change of a pixel {c:.4f} of 1"
            for n, c in zip(chosen, result["change"])
        ),
        f"page: {page}",
        diffusion.loaded_as(model, pipe),
    ]
    diffusion.finish(result, json, lines, notes)


def _images(
    pipe: Any, prompt: str, seeds: list[int], keywords: dict[str, Any], method: Any
) -> tuple[list[tuple[Any, Any]], dict[str, float]]:
    """The plain and the structured image of every seed, and the seconds of each kind."""
    import torch

    from regard.progress import bar
    from regard.watching import apply

    pairs, seconds = [], dict.fromkeys(NAMES, 0.0)
    total = 2 * len(seeds) * diffusion.steps_of(pipe, keywords)
    with bar(total, f"{2 * len(seeds)} images") as advance, torch.no_grad():
        calls = {**keywords, "callback_on_step_end": diffusion.ticking(advance)}
        for seed in seeds:
            started = time.perf_counter()
            plain = diffusion.image(pipe, prompt, seed, calls)
            between = time.perf_counter()
            with apply(pipe, method):
                structured = diffusion.image(pipe, prompt, seed, calls)
            seconds["plain"] += between - started
            seconds["structured"] += time.perf_counter() - between
            pairs.append((plain, structured))
    return pairs, seconds


def _write(folder: Path, result: dict[str, Any], pairs: list[tuple[Any, Any]]) -> Path:
    """Write the images, the sheet and the page."""
    for seed, pair in zip(result["seeds"], pairs):
        diffusion.write_images(folder, {f"{n}-{seed}": image for n, image in zip(NAMES, pair)})
    phrases = ", ".join(f"“{p}”" for p in result["phrases"]) or "none found"
    mode = "conjunction" if result["settings"]["conjunction"] else "mean of values"
    notes = [f"Phrases: {phrases}. Mode: {mode}. Same noise in both columns.", *result["notes"]]
    rows = {f"seed {seed}": pair for seed, pair in zip(result["seeds"], pairs)}
    return diffusion.write_page(folder, result["prompt"], notes, rows, NAMES)


COMMANDS = {"run": run}
