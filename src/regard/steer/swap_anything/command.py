"""regard run swap-anything: another object in the place of one, all else untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import err
from regard.cli.pages import check_places, check_png
from regard.errors import InputError
from regard.files import write_bytes
from regard.zoo.options import Loading, placed

from .card import Settings


def run(
    settings: Settings,
    loading: Loading,
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
    model: diffusion.UNet = "shapes-sd",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the picture here.")] = Path(
        "swapped.png"
    ),
    json: diffusion.Json = None,
) -> None:
    """Swap an object for another that you describe, or for one learnt from a few pictures.

    A concept is kept beside the output while it is learnt: a stopped run goes on with it, and the
    next one takes it up.
    """
    from regard.report.contact import png
    from regard.zoo.pictures import read_all
    from regard.zoo.pipelines import need_diffusers

    check_places(json, out)
    check_png(out)
    targets = _targets(object_, target, concept, insert, mask)
    need_diffusers()
    from regard.parts.diffusion.inversion import check

    picture = read_all([image])[0]
    area = None if mask is None else read_all([mask])[0].convert("L")
    pictures = _concept_pictures(concept)
    pipe = diffusion.load(model, loading)
    check(pipe)
    text = caption or ("nothing" if insert else " and ".join(f"a {o}" for o in object_))
    swaps, now = [], picture
    for n, (old, new) in enumerate(targets):
        given = area if n == 0 else None
        vector = None if concept is None else (concept, pictures, out)
        now, swapped = _swap(pipe, now, text, old, new, given, vector, settings, insert)
        text = swapped["target"]
        swaps.append(swapped)
    write_bytes(out, png(now.resize(picture.size)))
    err().print(f"picture: {out}", markup=False, highlight=False)
    notes = []
    if not (caption or insert):
        notes.append(
            f"the picture was taken to show {swaps[0]['source']!r} and nothing else: say what it "
            "shows with --caption"
        )
    result = {
        "image": image.name,
        "model": model,
        "loaded": placed(pipe),
        "settings": settings.settings(),
        "swaps": swaps,
    }
    lines = [_line(new, swap) for (_, new), swap in zip(targets, swaps)]
    diffusion.finish(result, json, [*lines, diffusion.loaded_as(model, pipe)], notes)


def _line(new: str | None, swap: dict[str, Any]) -> str:
    guessed = " (mask guessed from attention)" if swap["guessed"] else ""
    return (
        f"{swap['object']} -> {new or swap['concept']}: {swap['cells']} of {swap['of']} latent "
        f"cells, error of the inversion {swap['error']:.2g}{guessed}"
    )


def _swap(
    pipe: Any,
    picture: Any,
    text: str,
    old: str,
    new: str | None,
    mask: Any,
    concept: tuple[Path, list[Any], Path] | None,
    settings: Settings,
    insert: bool,
) -> tuple[Any, dict[str, Any]]:
    """The picture after one swap, and its figures."""
    from regard.progress import bar

    from .objects import PASSES, swap_object, wording

    words = wording(text, old, new, insert)
    vector = None
    if concept is not None:
        vector = _vector(pipe, *concept, words.word, settings.concept_steps)
    with bar(PASSES * settings.steps, f"swapping {old}") as advance:
        swapped = swap_object(
            pipe, picture, text, old, new,
            mask=mask, insert=insert, concept=vector, settings=settings, progress=advance,
        )  # fmt: skip
    return swapped.image, {
        "object": old,
        "source": words.source,
        "target": words.target,
        "concept": concept and concept[0].name,
        "guessed": mask is None,
        **swapped.report(),
    }


def _vector(pipe: Any, concept: Path, pictures: list[Any], out: Path, word: str, steps: int) -> Any:
    """The learnt concept: from its file, or from its pictures."""
    from PIL import ImageOps

    from regard.progress import bar

    from . import concepts
    from .objects import side_of

    if not pictures:
        return concepts.load(concept)
    file = out.with_name(f"{concept.name}.safetensors")
    side = side_of(pipe)
    small = [ImageOps.fit(picture, (side, side)) for picture in pictures]
    with bar(steps, f"learning {concept.name}") as advance:
        vector = concepts.learn(pipe, small, word, steps=steps, file=file, progress=advance)
    err().print(f"concept: {file}", markup=False, highlight=False)
    return vector


def _targets(
    objects: list[str],
    target: list[str] | None,
    concept: Path | None,
    insert: bool,
    mask: Path | None,
) -> list[tuple[str, str | None]]:
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
    from regard.zoo.pictures import read_all

    if concept is None:
        return []
    if concept.is_file() and concept.suffix == ".safetensors":
        from .concepts import load

        load(concept)  # a damaged one is refused before any work
        return []
    if not concept.is_dir():
        raise InputError(
            f"there is no folder {concept}: name a folder of pictures of the concept, or a learnt "
            "one (.safetensors)"
        )
    return read_all(diffusion.pictures(concept))


COMMANDS = {"run": run}
