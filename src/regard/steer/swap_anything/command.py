"""regard run swap-anything: another object in the place of one, all else untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import err, write_json
from regard.cli.pages import check_places, check_png
from regard.errors import InputError
from regard.files import write_bytes

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def run(
    image: Annotated[Path, typer.Option(help="The picture.")],
    object_: Annotated[
        list[str],
        typer.Option("--object", help="A word or phrase of the caption; repeat for several."),
    ],
    target: Annotated[
        list[str] | None, typer.Option(help="What comes in its place, one for each --object.")
    ] = None,
    concept: Annotated[
        Path | None, typer.Option(help="Folder of pictures of one thing, to be learnt; or a file.")
    ] = None,
    caption: Annotated[
        str | None, typer.Option(help='What the picture shows; "a OBJECT" if left out.')
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where the object is; guessed from attention if not.")
    ] = None,
    insert: Annotated[
        bool, typer.Option(help="Put the target where the mask is, in place of nothing.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="shapes-sd, or folder or hub id of a StableDiffusionPipeline.")
    ] = "shapes-sd",
    out: Annotated[Path, typer.Option(help="Write the picture here.")] = Path("swapped.png"),
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps; the paper takes 50.")] = 20,
    null_steps: Annotated[
        int, typer.Option(min=0, help="Updates of the empty prompt a step.")
    ] = 10,
    concept_steps: Annotated[int, typer.Option(min=1, help="Steps of learning the concept.")] = 200,
    guidance: Annotated[float, typer.Option(help="Guidance.")] = 7.5,
    keep: Annotated[
        str,
        typer.Option(help="Shares of the steps that swap latents, cross maps, self maps, outputs."),
    ] = "1,0.4,0.5,0.2",
    shape: Annotated[float, typer.Option(min=0.0, help="Strength of scale adaptation.")] = 0.0,
    threshold: Annotated[float, typer.Option(help="Of the guessed mask, 0 to 1.")] = 0.5,
    json: Annotated[
        Path | None, typer.Option(help="Write every figure and setting as JSON here; - for stdout.")
    ] = None,
) -> None:
    """Swap an object for another that you describe, or for one learnt from a few pictures.

    A concept is kept beside the output while it is learnt: a stopped run goes on with it, and the
    next one takes it up.

    [bold]Examples[/]

      regard run swap-anything --image scene.png --caption "a red circle and a blue square"
      --object "red circle" --target "green star" --mask circle.png

      regard run swap-anything --image scene.png --object circle --concept my_concept/
    """
    from regard.report.contact import png
    from regard.zoo.pictures import read_all as read_images
    from regard.zoo.pipelines import need_diffusers

    check_places(json, out)
    check_png(out)
    targets = _targets(object_, target, concept, insert, mask)
    shares = _shares(keep)
    need_diffusers()
    from regard.parts.diffusion.inversion import check

    picture = read_images([image])[0]
    given = None if mask is None else read_images([mask])[0].convert("L")
    pictures = _concept_pictures(concept)
    pipe = diffusion.load(model)
    check(pipe)
    text = caption or ("nothing" if insert else " and ".join(f"a {o}" for o in object_))
    results, now = [], picture
    for n, (old, new) in enumerate(targets):
        now, told = _one(
            pipe, now, text, old, new, given if n == 0 else None, pictures, concept, out,
            steps=steps, null_steps=null_steps, concept_steps=concept_steps, guidance=guidance,
            shares=shares, shape=shape, threshold=threshold, insert=insert,
        )  # fmt: skip
        text = told["target"]
        results.append(told)
    write_bytes(out, png(now.resize(picture.size)))
    err().print(f"picture: {out}", markup=False, highlight=False)
    if not (caption or insert):
        said = f"note: the picture was taken to show {results[0]['source']!r} and nothing else"
        err().print(f"{said}: say what it shows with --caption", markup=False, highlight=False)
    write_json({"image": image.name, "model": model, "swaps": results}, json)
    if json is None or str(json) != "-":
        for (old, new), told in zip(targets, results):
            print(
                f"{old} -> {new or told['concept']}: {told['cells']} of {told['of']} latent "
                f"cells, error of the inversion {told['error']:.2g}"
                + (" (mask guessed from attention)" if told["guessed"] else "")
            )


def _one(
    pipe: Any, picture: Any, text: str, old: str, new: str | None, mask: Any, pictures: list[Any],
    concept: Path | None, out: Path, *, steps: int, null_steps: int, concept_steps: int,
    guidance: float, shares: list[float], shape: float, threshold: float, insert: bool,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    import numpy as np
    import torch

    from regard.parts.diffusion.inversion import invert, null_text
    from regard.parts.diffusion.prompt_to_prompt import span_columns, word_span
    from regard.progress import bar
    from regard.steer.swap_anything import concepts as swap_concepts
    from regard.steer.swap_anything.method import Steps, object_mask, swap

    side = _side(pipe)
    small = picture.convert("RGB").resize((side, side))
    if insert:
        start, end, word, target = 2, 2, old, f"a {new}"
    else:
        start, end = word_span(text, old)
        word = text[start:end].split()[-1]
        target = text if new is None else text[:start] + new + text[end:]
    last = end if new is None else start + len(new)
    embeds, shown = None, span_columns(pipe.tokenizer, target, start, last)
    if concept is not None:
        vector = _vector(pipe, concept, pictures, word, out, concept_steps)
        embeds = swap_concepts.encode(pipe, target, word, vector).detach()
    with bar(2 * steps, "inverting the picture") as advance:
        inverted = invert(pipe, small, text, steps=steps, progress=advance)
        nulls = null_text(
            pipe, inverted, guidance=guidance, inner_steps=null_steps, progress=advance
        )
    guessed = mask is None
    if mask is None:
        area = object_mask(
            pipe,
            inverted,
            nulls,
            span_columns(pipe.tokenizer, text, start, end),
            threshold,
            guidance,
        )
    else:
        area = torch.from_numpy(np.asarray(mask.resize((side, side)), dtype=np.float32) / 255)
    plan = Steps(*(round(share * steps) for share in shares))
    with bar(steps, "swapping") as advance:
        made = swap(
            pipe, inverted, nulls, area, target, steps=plan, embeds=embeds, guidance=guidance,
            shape=shape, shape_words=shown, progress=advance,
        )  # fmt: skip
    size = (inverted.latents[0].shape[-2], inverted.latents[0].shape[-1])
    cells = torch.nn.functional.adaptive_avg_pool2d(area[None, None].float(), size)[0, 0] > 0.5
    told = {
        "object": old, "source": text, "target": target, "concept": concept and concept.name,
        "error": made.error, "cells": int(cells.sum()), "of": cells.numel(), "guessed": guessed,
        "steps": steps, "swaps": plan.__dict__,
    }  # fmt: skip
    return made.image, told


def _side(pipe: Any) -> int:
    """Pixels of a side of the pictures that the pipeline was made for."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def _vector(pipe: Any, concept: Path, pictures: list[Any], word: str, out: Path, steps: int) -> Any:
    """The learnt concept: from its file, or from its pictures."""
    from PIL import ImageOps

    from regard.progress import bar
    from regard.steer.swap_anything import concepts as swap_concepts

    if not pictures:
        return swap_concepts.load(concept)
    kept = out.with_name(f"{concept.name}.safetensors")
    side = _side(pipe)
    small = [ImageOps.fit(picture, (side, side)) for picture in pictures]
    with bar(steps, f"learning {concept.name}") as advance:
        vector = swap_concepts.learn(pipe, small, word, steps=steps, file=kept, progress=advance)
    err().print(f"concept: {kept}", markup=False, highlight=False)
    return vector


def _targets(
    objects: list[str], target: list[str] | None, concept: Path | None, insert: bool,
    mask: Path | None,
) -> list[tuple[str, str | None]]:  # fmt: skip
    if target is None and concept is None:
        raise InputError("say what comes in its place: --target TEXT, or --concept FOLDER")
    if target is not None and len(target) != len(objects):
        raise InputError(f"{len(objects)} --object but {len(target)} --target: give one for each")
    if concept is not None and len(objects) > 1:
        raise InputError("a concept takes the place of one object: give one --object")
    if insert and (mask is None or target is None):
        raise InputError("--insert needs a --mask for the place and a --target for the thing")
    return list(zip(objects, target if target is not None else [None] * len(objects)))


def _concept_pictures(concept: Path | None) -> list[Any]:
    """The pictures of a concept's folder; none where a learnt one is given."""
    from regard.zoo.pictures import read_all as read_images

    if concept is None:
        return []
    if concept.is_file() and concept.suffix == ".safetensors":
        from regard.steer.swap_anything.concepts import load

        load(concept)  # a damaged one is said before any work
        return []
    if not concept.is_dir():
        raise InputError(
            f"there is no folder {concept}: name a folder of pictures of the concept, or a learnt "
            "one (.safetensors)"
        )
    found = sorted(p for p in concept.iterdir() if p.suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"{concept} holds no pictures ({', '.join(PICTURES)}): put some there")
    return read_images(found)


def _shares(given: str) -> list[float]:
    try:
        found = [float(x) for x in given.split(",")]
    except ValueError:
        found = []
    if len(found) != 4 or not all(0 <= x <= 1 for x in found):
        raise InputError(f"--keep is four shares from 0 to 1, such as 1,0.4,0.5,0.2, not {given!r}")
    return found


COMMANDS = {"run": run}
