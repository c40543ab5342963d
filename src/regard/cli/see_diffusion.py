"""regard see on a diffusion pipeline: the image, and one heat map for each word and phrase."""

from __future__ import annotations

import shlex
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from regard.cli import diffusion
from regard.cli.common import Loading, err, write_json
from regard.cli.pages import check_places, check_png
from regard.errors import InputError

PICTURE = 128  # pixels of a heat map's longer side on the page
STRIP = 64
PARTS = 8  # pictures along the steps


def see(
    prompt: str,
    model: str,
    loading: Loading,
    html: Path | None,
    json: Path | None,
    layers: list[int] | None,
    heads: list[int] | None,
    *,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | None = None,
    negative: str | None = None,
    image: Path | None = None,
) -> None:
    """Make one image and show where each word and phrase of the prompt was looked at.

    Raises:
        InputError: an empty prompt, a folder without a pipeline, an output that cannot be written.
        ReachError: a pipeline of a class that regard does not reach.
    """
    diffusion.check_prompt(prompt)
    check_places(json, html, image)
    check_png(image, "--image")
    pipe = diffusion.load(model, loading)
    keywords = diffusion.settings(pipe, steps, guidance, size, negative)
    seed = seed or 0
    drawn, maps, layered, seconds, notes = _run(pipe, prompt, seed, keywords, layers, heads)
    result = _result(prompt, model, seed, maps, seconds, notes)
    if image is not None:
        from regard.files import write_bytes
        from regard.report.contact import png

        write_bytes(image, png(drawn))
    if json is None or str(json) != "-":
        _show(result)
    write_json(result, json)
    for note in notes:
        err().print(f"note: {note}", markup=False)
    if html is not None:
        from regard.files import write_text

        write_text(html, _page(result, drawn, maps, layered))
        err().print(f"report: {html}", markup=False, highlight=False)


def _run(
    pipe: Any,
    prompt: str,
    seed: int,
    keywords: dict[str, Any],
    layers: list[int] | None,
    heads: list[int] | None,
) -> tuple[Any, Any, dict[str, Any], float, list[str]]:
    """The image, its maps by step, those by layer under the layer's name, seconds, and notes."""
    import torch

    from regard.parts.diffusion.words import WordMaps
    from regard.progress import bar
    from regard.watching import apply

    names, notes = _names(prompt)
    by_step = WordMaps(names, by="step", layers=layers, heads=heads)
    by_layer = WordMaps(names, by="layer", layers=layers, heads=heads)
    session = apply(pipe, by_step, by_layer)
    started = time.perf_counter()
    with bar(diffusion.steps_of(pipe, keywords), "denoising") as advance, torch.no_grad(), session:
        calls = {**keywords, "callback_on_step_end": diffusion.ticking(advance)}
        image = diffusion.image(pipe, prompt, seed, calls)
    seconds = time.perf_counter() - started
    notes += [*session.notes, *by_step.notes]
    layered = {
        name: {
            f"{s.part} {s.layer}": by_layer.map(name, label=s.index)[0]
            for s in sorted(session.sites, key=lambda s: (s.part, s.layer))
            if s.index in by_layer.labels
        }
        for name in by_layer.names
    }
    return image, by_step, layered, seconds, notes


def _names(prompt: str) -> tuple[list[str], list[str]]:
    """Every word of the prompt, then its noun phrases."""
    import re

    from regard.parts.text.phrases import default_parser, noun_phrases

    words = re.findall(r"[\w'-]+", prompt)
    if not words:
        raise InputError("the prompt holds no word to map: say in words what the image shows")
    parser, missing = default_parser()
    notes = [f"noun phrases by rules: {missing}"] if missing else []
    phrases = [
        p.text for p in noun_phrases(prompt, parser) if p.text.lower() != prompt.strip().lower()
    ]
    return [*words, *(p for p in phrases if p not in words)], notes


def _result(
    prompt: str, model: str, seed: int, maps: Any, seconds: float, notes: list[str]
) -> dict[str, Any]:
    grids = maps.grids
    words = []
    for name in maps.names:
        values = maps[name][0]
        peak = int(values.argmax())
        words.append(
            {
                "name": name,
                "mean": float(values.mean()),
                "max": float(values.max()),
                "peak": [peak // values.shape[1], peak % values.shape[1]],
                "map": [[float(f"{v:.4g}") for v in row] for row in values.tolist()],
            }
        )
    return {
        "prompt": prompt,
        "model": model,
        "seed": seed,
        "steps": len(maps.labels),
        "grid": list(grids[0]),
        "grids": [list(g) for g in grids],
        "seconds": seconds,
        "words": words,
        "notes": notes,
        "command": "regard " + " ".join(shlex.quote(a) for a in sys.argv[1:]),
    }


def _show(result: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.table import Table, right

    height, width = result["grid"]
    rows = [
        [word["name"], word["mean"], word["max"], "{}, {}".format(*word["peak"])]
        for word in result["words"]
    ]
    digits = "{:.4f}".format
    columns = ["word or phrase", right("mean", digits), right("max", digits), "peak (row, column)"]
    show(Table(columns, rows, f"attention on each word, {height} x {width} cells"))


def _page(result: dict[str, Any], image: Any, maps: Any, layered: dict[str, Any]) -> str:
    from regard.report.contact import figure, heat, page

    height, width = maps.grids[0]

    def size(longest: int) -> tuple[int, int]:
        unit = max(1, longest // max(height, width))
        return unit * width, unit * height

    scale = max(1, 256 // max(image.size))
    sections = {"Image": [figure(image, f"seed {result['seed']}", scale * image.width)]}
    sections["Every word and phrase, mean over steps and layers"] = [
        figure(heat(maps[name][0], size(PICTURE)), f"{name}: at most {float(maps[name].max()):.3f}")
        for name in maps.names
    ]
    parts = _parts(maps.labels)
    for name in maps.names:
        figures = []
        for own in parts:
            mean = sum(maps.map(name, label=n)[0] for n in own) / len(own)
            text = f"step {own[0]}" if len(own) == 1 else f"steps {own[0]}-{own[-1]}"
            figures.append(figure(heat(mean, size(STRIP)), text))
        for where, values in layered[name].items():
            figures.append(figure(heat(values, size(STRIP)), where))
        sections[f"{name}: over steps, then over layers"] = figures
    notes = [
        f"{result['model']}, {result['steps']} steps, {result['seconds']:.1f} s. Each map runs "
        "from its own least value to its greatest; the mean over steps is taken at the finest "
        f"resolution, {height} x {width}.",
        *result["notes"],
    ]
    return page(result["prompt"], notes, sections)


def _parts(labels: list[int]) -> list[list[int]]:
    """The steps in at most `PARTS` runs of nearly equal length."""
    count = min(PARTS, len(labels))
    edges = [round(n * len(labels) / count) for n in range(count + 1)]
    return [labels[a:b] for a, b in pairwise(edges)]
