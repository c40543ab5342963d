"""regard run dynamic-prompt-learning: edit a picture, plain and with nouns learnt for each step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import check_output
from regard.cli.derive import flat
from regard.errors import InputError
from regard.files import check_folder
from regard.zoo.options import Loading, placed

from .card import Settings

NAMES = ("plain", "learnt")
QUICK = {"steps": 20, "inner_steps": 10, "null_steps": 10, "warm_start": True}
"""Defaults of the command; the paper's take minutes a picture on a GPU."""
Made = dict[str, tuple[Any, Any]]  # name -> what was learnt, and the edit


def run(
    settings: Settings,
    loading: Loading,
    image: Annotated[Path, typer.Option(help="The picture to edit.")],
    caption: Annotated[str, typer.Option(help="What it shows.")],
    edit: Annotated[
        str | None, typer.Option(help='"blue square -> green square": other words of the caption.')
    ] = None,
    refine: Annotated[
        str | None, typer.Option(help="The whole caption of the edit, with words more or fewer.")
    ] = None,
    reweight: Annotated[
        list[str] | None, typer.Option(help="word=2.0: attention to a word, multiplied; repeat.")
    ] = None,
    model: diffusion.UNet = "shapes-sd",
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for pictures, page and the finished steps."),
    ] = Path("dynamic-prompt-learning"),
    blend: Annotated[
        bool, typer.Option(help="With --edit: keep the picture where neither phrase is looked at.")
    ] = True,
    json: diffusion.Json = None,
) -> None:
    """Dynamic Prompt Learning: nouns learnt at every step, so that an edit stays where it belongs.

    Inverts the picture twice: plain (null-text inversion) and with learnt nouns, and edits both by
    Prompt-to-Prompt. Writes the pictures, the nouns' maps before and after, a contact sheet
    (sheet.png) and a page (index.html). Each finished step is kept in the folder: the same command
    goes on where it stopped.
    """
    from regard.zoo.pictures import read_all
    from regard.zoo.pipelines import need_diffusers

    diffusion.check_prompt(caption)
    target, local = wanted(caption, edit, refine, reweight)
    weights = factors(reweight)
    check_output(json)
    check_folder(out)
    picture = read_all([image])[0]
    need_diffusers()
    from .method import DynamicPromptLearning

    method = DynamicPromptLearning(**settings.settings())
    method.named(caption)
    pipe = diffusion.load(model, loading)
    method.find(pipe, caption)
    folder = diffusion.make_folder(out)
    how = {"weights": weights, "local": local if blend else None}
    made, seconds = _make(pipe, method, picture, caption, target, how, folder)
    result = {
        "caption": caption,
        "target": target,
        "weights": weights,
        **compared(made),
        "seconds": seconds,
        "settings": {"model": model, **method.settings()},
        "loaded": placed(pipe),
    }
    page = _write(folder, picture, result, made)
    notes = []
    if not made["learnt"][0].ground.any():
        notes.append("no background was found, so its loss had nothing to do")
    if blend and local is not None and None in result["outside"].values():
        notes.append("the edited words are looked at everywhere, so no part had to stay")
    lines = [*_lines(result), f"page: {page}", diffusion.loaded_as(model, pipe)]
    diffusion.finish(result, json, lines, notes)


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"nouns: {', '.join(map(repr, result['nouns']))}; edit: {result['target']!r}"
    for name in NAMES:
        inside, outside = result["inside"][name], result["outside"][name]
        where = (
            f"of the picture {inside:.4f} of 1"  # nothing says which part was to stay
            if outside is None
            else f"outside the edited words {outside:.4f} of 1, inside {inside:.4f}"
        )
        error = result["reconstruction"][name]
        yield f"{name}: change {where}; reconstruction error {error:.4f}"
    before, after = (result["leakage"][when]["pairs"] for when in ("before", "after"))
    for pair, value in after.items():
        yield f"overlap of maps, {pair}: {before[pair]:.3f} before, {value:.3f} after"


def wanted(
    caption: str, edit: str | None, refine: str | None, reweight: list[str] | None
) -> tuple[str, tuple[str, str] | None]:
    """The edit's caption, and the words of source and edit that may change the picture.

    >>> wanted("a red circle", "red -> blue", None, None)
    ('a blue circle', ('red', 'blue'))

    Raises:
        InputError: no edit, two edits, or words that are not in the caption exactly once.
    """
    from regard.parts.diffusion.prompt_to_prompt import word_span

    if edit is not None and refine is not None:
        raise InputError("--edit and --refine are mutually exclusive")
    if refine is not None:
        return diffusion.check_prompt(refine), None
    if edit is None:
        if not reweight:
            raise InputError("say what to change: --edit, --refine or --reweight")
        return caption, None
    old, arrow, new = (part.strip() for part in edit.partition("->"))
    if not (old and arrow and new):
        raise InputError(f'--edit is "old words -> new words", not {edit!r}')
    start, end = word_span(caption, old)
    return caption[:start] + new + caption[end:], (old, new)


def factors(given: list[str] | None) -> dict[str, float]:
    """ "word=2.0" as a table.

    >>> factors(["red=2", "circle=0.5"])
    {'red': 2.0, 'circle': 0.5}
    """
    table = {}
    for one in given or []:
        word, _, number = one.rpartition("=")
        try:
            table[word.strip()] = float(number)
        except ValueError:
            word = ""
        if not word.strip():
            raise InputError(f"--reweight is word=2.0, not {one!r}")
    return table


def _make(
    pipe: Any,
    method: Any,
    picture: Any,
    caption: str,
    target: str,
    how: dict[str, Any],
    folder: Path,
) -> tuple[Made, dict[str, float]]:
    """What was learnt and the edit, without and with learnt nouns."""
    from regard.parts.diffusion.inversion import encode_image
    from regard.progress import bar

    from .editing import edit

    latents = encode_image(pipe, picture)
    made, seconds = {}, {}
    with bar(6 * method.steps, "inverting, learning, editing") as advance:
        for name in NAMES:
            started = time.perf_counter()
            arm = method if name == "learnt" else replace(method, inner_steps=0)
            learned = arm.learn(pipe, latents, caption, folder=folder / name, progress=advance)
            made[name] = learned, edit(pipe, learned, target, progress=advance, **how)
            seconds[name] = time.perf_counter() - started
    return made, seconds


def compared(made: Made) -> dict[str, Any]:
    """Plain data: the change outside and inside of the edited words, the error of the
    reconstruction, and what learning did to the nouns' maps.
    """
    import numpy as np

    outside: dict[str, float | None] = {}
    inside, error = {}, {}
    for name, (learned, edited) in made.items():
        mask = np.ones(edited.image.size[::-1], dtype=bool)
        if edited.mask is not None:
            small = edited.mask.cpu().numpy()
            times = [n // m for n, m in zip(mask.shape, small.shape)]
            mask = small.repeat(times[0], 0).repeat(times[1], 1)
        pair = edited.source, edited.image
        # where the whole picture may change there is no outside
        outside[name] = None if mask.all() else diffusion.change(*pair, ~mask)
        inside[name] = diffusion.change(*pair, mask)
        error[name] = float(learned.losses[-1]["error"])
    figures = {"outside": outside, "inside": inside, "reconstruction": error}
    return {**figures, **made["learnt"][0].report()}


def _write(folder: Path, picture: Any, result: dict[str, Any], made: Made) -> Path:
    """Write the pictures, the maps, the sheet and the page."""
    from regard.report.contact import heat, sheet

    rows = {name: [picture, edited.source, edited.image] for name, (_, edited) in made.items()}
    for name, (_, source, image) in rows.items():
        diffusion.write_images(folder, {f"{name}-source": source, f"{name}-edit": image})
    learned = made["learnt"][0]
    ground = learned.ground.float()
    names = (*learned.nouns, "background")
    maps = {
        when: [heat(one.cpu().numpy(), picture.size) for one in (*nouns, ground)]
        for when, nouns in (("before", learned.before), ("after", learned.maps))
    }
    diffusion.write_images(folder, {"maps": sheet(list(maps.values()), names, list(maps))})
    more = {f"maps {when}": dict(zip(names, row)) for when, row in maps.items()}
    notes = [
        f"Source: “{result['caption']}”. Edit: “{result['target']}”.",
        "Plain: null-text inversion and Prompt-to-Prompt. Learnt: the nouns learnt at every step "
        "as well.",
    ]
    columns = ("picture", "made again", "edit")
    return diffusion.write_page(folder, result["target"], notes, rows, columns, more)


COMMANDS = {"run": flat(run, QUICK)}
