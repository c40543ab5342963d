"""regard run structured-diffusion: plain and structured images of the same seeds, side by side."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import check_output, err, write_json


def run(
    prompt: Annotated[str, typer.Argument(help="What the image should show.")],
    model: Annotated[
        str, typer.Option(help="shapes-sd, or folder or hub id of a StableDiffusionPipeline.")
    ] = "shapes-sd",
    seeds: Annotated[str, typer.Option(help="How many seeds, or which: 8, or 0,3,5-7.")] = "4",
    out: Annotated[
        Path, typer.Option(help="Folder for the images, the contact sheet and the page.")
    ] = Path("structured-diffusion"),
    parser: Annotated[
        str, typer.Option(help="Who finds the phrases: spacy, constituency or rules.")
    ] = "spacy",
    phrase: Annotated[
        list[str] | None, typer.Option(help="A phrase of the prompt, in place of a parser; repeat.")
    ] = None,
    conjunction: Annotated[
        bool, typer.Option(help='For "A and B": one set of keys a phrase.')
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps (the pipeline's own when left out).")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance (the pipeline's own when left out).")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="512, or 768x512 (the pipeline's own when left out).")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """Structured Diffusion Guidance: each noun phrase of the prompt keeps its own text encoding.

    Writes every image, a contact sheet (sheet.png) and a page (index.html) with the plain model
    beside it, from the same noise. The effect is an average over seeds: look at several.

    [bold]Examples[/]

      regard run structured-diffusion "a red car and a white sheep" --seeds 8 --out cars

      regard run structured-diffusion "a red car and a white sheep" --model path/to/pipeline
      --phrase "a red car" --phrase "a white sheep"
    """
    from regard.steer.structured_diffusion.method import StructuredDiffusion

    diffusion.check_prompt(prompt)
    chosen = diffusion.seeds(seeds)
    method = StructuredDiffusion(parser=parser, phrases=phrase or None, conjunction=conjunction)
    found = method.find(prompt)
    check_output(json)
    pipe = diffusion.load(model)
    keywords = diffusion.settings(pipe, steps, guidance, size)
    _check(pipe)
    folder = diffusion.make_folder(out)
    if not found:
        err().print(
            f"note: no noun phrase of two words or more in {prompt!r}: both columns will be alike",
            markup=False,
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs, seconds = _images(pipe, prompt, chosen, keywords, method)
    notes = [str(w.message) for w in caught if str(w.message).startswith("StructuredDiffusion: ")]
    result = _result(prompt, model, chosen, keywords, method, pairs, seconds, notes)
    _write(folder, result, pairs)
    write_json(result, json)
    for note in notes:
        err().print(f"note: {note}", markup=False, highlight=False)
    if json is None or str(json) != "-":
        named = ", ".join(repr(p) for p in result["phrases"]) or "none"
        print(f"phrases: {named}")
        for seed, change in zip(chosen, result["change"]):
            print(f"seed {seed}: mean change of a pixel {change:.4f} of 1")
        print(f"page: {folder / 'index.html'}")


def _check(pipe: Any) -> None:
    """Refuse what the method cannot act on before any image is made."""
    from regard.steer.structured_diffusion.method import StructuredDiffusion
    from regard.watching import apply

    apply(pipe, StructuredDiffusion(parser="rules"))


def _images(
    pipe: Any, prompt: str, seeds: list[int], keywords: dict[str, Any], method: Any
) -> tuple[list[tuple[Any, Any]], dict[str, float]]:
    """The plain and the structured image of every seed."""
    import torch

    from regard.progress import bar
    from regard.watching import apply

    pairs, seconds = [], {"plain": 0.0, "structured": 0.0}
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


def _result(
    prompt: str,
    model: str,
    seeds: list[int],
    keywords: dict[str, Any],
    method: Any,
    pairs: list[tuple[Any, Any]],
    seconds: dict[str, float],
    notes: list[str],
) -> dict[str, Any]:
    import numpy as np

    def change(a: Any, b: Any) -> float:
        arrays = [np.asarray(x.convert("RGB"), dtype=np.float64) / 255 for x in (a, b)]
        return float(abs(arrays[0] - arrays[1]).mean())

    structure = next(iter(method.used.values()), None)
    return {
        "prompt": prompt,
        "phrases": [p.text for p in structure.phrases] if structure else [],
        "skipped": [p.text for p in structure.skipped] if structure else [],
        "seeds": seeds,
        "change": [change(a, b) for a, b in pairs],
        "seconds": seconds,
        "settings": {
            "model": model,
            "parser": None if method.phrases is not None else method.parser,
            "conjunction": method.conjunction,
            **keywords,
        },
        "notes": notes,
    }


def _write(folder: Path, result: dict[str, Any], pairs: list[tuple[Any, Any]]) -> None:
    from regard.files import write_bytes, write_text
    from regard.report.contact import figure, page, png, sheet

    names = ("plain", "structured")
    labels = [f"seed {seed}" for seed in result["seeds"]]
    for seed, pair in zip(result["seeds"], pairs):
        for name, image in zip(names, pair):
            write_bytes(folder / f"{name}-{seed}.png", png(image))
    write_bytes(folder / "sheet.png", png(sheet(pairs, names, labels)))
    phrases = ", ".join(f"“{p}”" for p in result["phrases"]) or "none found"
    mode = "conjunction" if result["settings"]["conjunction"] else "mean of values"
    notes = [f"Phrases: {phrases}. Mode: {mode}. Same noise in both columns.", *result["notes"]]
    wide = max(128, pairs[0][0].width) if pairs[0][0].width < 512 else None
    sections = {
        label: [figure(image, name, wide) for name, image in zip(names, pair)]
        for label, pair in zip(labels, pairs)
    }
    write_text(folder / "index.html", page(result["prompt"], notes, sections))


COMMANDS = {"run": run}
