"""regard build: data sets made with a model, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import check_file, check_output, err, write_json
from regard.errors import InputError

SAMPLES = 24  # images on the page
ROOTS = 12


def build(
    prompts: Annotated[
        Path,
        typer.Option(help='One prompt a line, or JSON lines with "prompt", "source", "licence".'),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")],
    model: Annotated[
        str, typer.Option(help="A diffusion pipeline: name, folder or hub id.")
    ] = "shapes-sd",
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images of each caption.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn together.")] = 5,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps (the pipeline's own when left out).")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance (the pipeline's own when left out).")
    ] = None,
    grid: Annotated[int, typer.Option(min=1, help="Side of the stored maps.")] = 64,
    resize: Annotated[str, typer.Option(help="bicubic, bilinear or area.")] = "bicubic",
    finest: Annotated[
        bool, typer.Option("--finest", help="Average the layers of finest resolution alone.")
    ] = False,
    parser: Annotated[str, typer.Option(help="spacy, constituency or rules.")] = "spacy",
    shard: Annotated[int, typer.Option(min=1, help="Captions in a shard.")] = 20,
    seed: Annotated[int, typer.Option(help="Moves all seeds together.")] = 0,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to spread the shards over.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page of samples (OUT/index.html when left out).")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the statistics as JSON here; - for stdout.")
    ] = None,
) -> None:
    """StableSemantics: images of each prompt, with one attention map for each noun chunk.

    Writes checksummed Parquet shards that `datasets.load_dataset` reads, a card, statistics and a
    page of samples. Stopped at any point, the same command goes on and ends with the same bytes.

    [bold]Example[/]

      regard build stable-semantics --model shapes-sd --prompts prompts.txt --out dataset
      --images-per-prompt 4 --steps 15
    """
    from regard.parts.text.phrases import noun_phrases
    from regard.see.stable_semantics.build import build, build_on_ray, load, need_ray
    from regard.see.stable_semantics.method import Recipe, features, read_prompts

    recipe = Recipe(
        images=images_per_prompt,
        batch=batch,
        steps=steps,
        guidance=guidance,
        grid=grid,
        resize=resize,
        finest=finest,
        parser=parser,
        captions=shard,
        seed=seed,
    )
    features()
    if ray is not None:
        need_ray()
    noun_phrases("a", parser)
    check_file(html)
    check_output(json)
    found = read_prompts(_lines(prompts))
    folder = diffusion.make_folder(out)
    _announce(found, recipe)
    if ray is not None:
        from regard.zoo.pipelines import load_pipeline

        build_on_ray(model, found, folder, recipe, ray, load_pipeline)
    else:
        pipe = diffusion.load(model)
        diffusion.settings(pipe, steps, guidance, None)
        build(pipe, found, folder, recipe, model=model)
    _finish(load(folder), folder, html, json)


def _lines(path: Path) -> list[str]:
    try:
        return path.expanduser().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: write one prompt a line") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise InputError(f"{path} is no text file: write one prompt a line") from None


def _announce(found: list[Any], recipe: Any) -> None:
    """What the build will come to, before it begins."""
    from regard.see.stable_semantics.method import chunks, clean

    images = len(found) * recipe.images
    maps = recipe.images * sum(len(chunks(clean(p.text), recipe.parser)) for p in found)
    size = maps * recipe.grid**2 * 2 / 1e6
    err().print(
        f"{len(found)} prompts, {images} images, about {maps} maps, at most {size:.1f} MB of maps "
        "before compression",
        markup=False,
        highlight=False,
    )
    bare = sum(not p.licence for p in found)
    if bare:
        err().print(
            f"note: {bare} prompts name no licence: their rows are not to be published",
            markup=False,
            highlight=False,
        )


def _finish(rows: Any, folder: Path, html: Path | None, json: Path | None) -> None:
    from regard.files import write_text
    from regard.see.stable_semantics.stats import statistics

    made = statistics(rows)
    write_json(made, folder / "statistics.json")
    write_json(made, json)
    page = html or folder / "index.html"
    write_text(page, _page(rows, made, folder.name))
    if json is None or str(json) != "-":
        print(f"images: {made['images']}, maps: {made['maps']}, cut off: {made['cut']}")
        same = made["consistency"]["same chunk"]
        if same is not None:
            other = made["consistency"]["other chunk"]
            beside = "" if other is None else f" ({other:.2f} for other chunks)"
            print(f"a chunk's maps over its images: mean cosine {same:.2f}{beside}")
        print(f"page: {page}")


def _page(rows: Any, made: dict[str, Any], name: str) -> str:
    """Samples spread over the build, and the average map of the most frequent roots."""
    from regard.report.contact import figure, heat, page

    sections: dict[str, list[str]] = {}
    for n in sorted({round(k * (len(rows) - 1) / (SAMPLES - 1)) for k in range(SAMPLES)}):
        row = rows[n]
        image = row["image"]
        wide = max(128, min(256, image.width))
        size = (wide, max(1, round(wide * image.height / image.width)))
        figures = [figure(image.resize(size), f"seed {row['seed']}")]
        figures += [
            figure(heat(c["map"], size), f"{c['text']}: at most {c['greatest']:.3g}")
            for c in row["chunks"]
            if c["map"] is not None
        ]
        sections[f"{n}: {row['caption']}"] = figures
    sections["Where the most frequent roots lie"] = [
        figure(heat(root["map"], (96, 96)), f"{word} ({root['count']})")
        for word, root in list(made["roots"].items())[:ROOTS]
    ]
    notes = [
        f"{made['images']} images of {made['captions']} captions, {made['maps']} maps, "
        f"{made['cut']} chunks cut off by the text encoder.",
        "A map is where the image looks at the words of a chunk, from its least value to its "
        "greatest: attribution, not segmentation.",
    ]
    return page(name, notes, sections)


COMMANDS = {"build": build}
