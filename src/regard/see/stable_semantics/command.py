"""regard build: data sets made with a model, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import err, write_json
from regard.cli.pages import check_places
from regard.errors import InputError
from regard.files import check_folder, write_text
from regard.zoo.options import Loading

from .card import Settings

SAMPLES = 24  # images on the page
ROOTS = 12


def build(
    recipe: Settings,
    loading: Loading,
    prompts: Annotated[
        Path,
        typer.Option(help='One prompt a line, or JSON lines with "prompt", "source", "licence".'),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the data set.")],
    model: Annotated[
        str, typer.Option(help="A diffusion pipeline: name, folder or hub id.")
    ] = "shapes-sd",
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to spread the shards over.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page of samples (OUT/index.html when left out)."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write the statistics as JSON here; - for stdout."),
    ] = None,
) -> None:
    """StableSemantics: images of each prompt, with one attention map for each noun chunk.

    Writes checksummed Parquet shards that `datasets.load_dataset` reads, a card, statistics and a
    page of samples. Stopped at any point, the same command goes on and ends with the same bytes.
    """
    from regard.parts.text.phrases import noun_phrases

    from . import build as on_disk
    from .prompts import read_prompts
    from .rows import features
    from .stats import statistics

    features()
    if ray is not None:
        on_disk.need_ray()
    noun_phrases("a", recipe.parser)
    check_places(json, html)
    check_folder(out)
    lines = _lines(prompts)
    try:
        given = read_prompts(lines)
    except InputError as problem:
        raise InputError(f"{prompts}: {problem}") from None
    folder = diffusion.make_folder(out)
    _announce(given, recipe)
    lines = []
    if ray is not None:
        on_disk.build_on_ray(model, given, folder, recipe, ray, loading.pipeline)
    else:
        pipe = diffusion.load(model, loading)
        diffusion.settings(pipe, recipe.steps, recipe.guidance, None)
        on_disk.build(pipe, given, folder, recipe, model=model)
        lines.append(diffusion.loaded_as(model, pipe))
    rows = on_disk.load(folder)
    figures = statistics(rows)
    write_json(figures, folder / "statistics.json")
    page = html or folder / "index.html"
    write_text(page, _page(rows, figures, folder.name))
    diffusion.finish(figures, json, [*_show(figures, page), *lines])


def _lines(path: Path) -> list[str]:
    try:
        return path.expanduser().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: write one prompt a line") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise InputError(f"{path} is no text file: write one prompt a line") from None


def _announce(prompts: list[Any], recipe: Any) -> None:
    """What the build will come to, before it begins."""
    from .prompts import chunks, clean

    images = len(prompts) * recipe.images
    maps = recipe.images * sum(len(chunks(clean(p.text), recipe.parser)) for p in prompts)
    lines = [
        f"{len(prompts)} prompts, {images} images, about {maps} maps, at most "
        f"{maps * recipe.grid**2 * 2 / 1e6:.1f} MB of maps before compression"
    ]
    bare = sum(not p.licence for p in prompts)
    if bare:
        lines.append(f"note: {bare} prompts name no licence: their rows are not to be published")
    for line in lines:
        err().print(line, markup=False, highlight=False)


def _show(figures: dict[str, Any], page: Path) -> Iterator[str]:
    yield f"images: {figures['images']}, maps: {figures['maps']}, cut off: {figures['cut']}"
    same, other = (figures["consistency"][n] for n in ("same chunk", "other chunk"))
    if same is not None:
        beside = "" if other is None else f" ({other:.2f} for other chunks)"
        yield f"a chunk's maps over its images: mean cosine {same:.2f}{beside}"
    yield f"page: {page}"


def _page(rows: Any, figures: dict[str, Any], name: str) -> str:
    """Samples spread over the build, and the average map of the most frequent roots."""
    from regard.report.contact import figure, heat, page

    sections: dict[str, list[str]] = {}
    for n in sorted({round(k * (len(rows) - 1) / (SAMPLES - 1)) for k in range(SAMPLES)}):
        row = rows[n]
        image = row["image"]
        wide = max(128, min(256, image.width))
        size = (wide, max(1, round(wide * image.height / image.width)))
        shown = [figure(image.resize(size), f"seed {row['seed']}")]
        shown += [
            figure(heat(c["map"], size), f"{c['text']}: at most {c['greatest']:.3g}")
            for c in row["chunks"]
            if c["map"] is not None
        ]
        sections[f"{n}: {row['caption']}"] = shown
    sections["Where the most frequent roots lie"] = [
        figure(heat(root["map"], (96, 96)), f"{word} ({root['count']})")
        for word, root in list(figures["roots"].items())[:ROOTS]
    ]
    notes = [
        f"{figures['images']} images of {figures['captions']} captions, {figures['maps']} maps, "
        f"{figures['cut']} chunks cut off by the text encoder.",
        "A map is where the image looks at the words of a chunk, from its least value to its "
        "greatest: attribution, not segmentation.",
    ]
    return page(name, notes, sections)


COMMANDS = {"build": build}
