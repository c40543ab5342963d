"""regard run dynamic-prompt-learning: edit a picture, plain and with nouns learnt for each step."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import check_output, err, write_json
from regard.errors import InputError

NAMES = ("plain", "learnt")


def run(
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
    nouns: Annotated[
        list[str] | None,
        typer.Option(
            help="A noun to learn; repeat. The last word of each noun phrase if left out."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="shapes-sd, or folder or hub id of a StableDiffusionPipeline.")
    ] = "shapes-sd",
    out: Annotated[
        Path, typer.Option(help="Folder for pictures, page and the finished steps.")
    ] = Path("dynamic-prompt-learning"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the paper takes 50.")] = 20,
    inner_steps: Annotated[
        int, typer.Option(min=0, help="Updates of the nouns a step, at most; in the paper 21.")
    ] = 10,
    null_steps: Annotated[
        int, typer.Option(min=0, help="Updates of the empty prompt a step; in the paper 51.")
    ] = 10,
    guidance: Annotated[float, typer.Option(help="Guidance.")] = 7.5,
    warm_start: Annotated[
        bool,
        typer.Option(
            help="Begin each step's empty prompt with that of the last; the paper does not."
        ),
    ] = True,
    blend: Annotated[
        bool, typer.Option(help="With --edit: keep the picture where neither phrase is looked at.")
    ] = True,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """Dynamic Prompt Learning: nouns learnt at every step, so that an edit stays where it belongs.

    Inverts the picture twice: plain (null-text inversion) and with learnt nouns, and edits both by
    Prompt-to-Prompt. Writes the pictures, the nouns' maps before and after, a contact sheet
    (sheet.png) and a page (index.html). Each finished step is kept in the folder: the same command
    goes on where it stopped. At full size this takes minutes a picture on a GPU.

    [bold]Examples[/]

      regard run dynamic-prompt-learning --image scene.png --caption "a red circle and a blue
      square" --edit "blue square -> green square"

      regard run dynamic-prompt-learning --image scene.png --caption "a red circle and a blue
      square" --reweight blue=2.0 --nouns circle --nouns square
    """
    from regard.zoo.pictures import read_all as read_images
    from regard.zoo.pipelines import need_diffusers

    diffusion.check_prompt(caption)
    target, local = wanted(caption, edit, refine, reweight)
    weights = factors(reweight)
    check_output(json)
    picture = read_images([image])[0]
    chosen = list(nouns) if nouns else found_nouns(caption)
    need_diffusers()
    from regard.steer.dynamic_prompt_learning.method import DynamicPromptLearning

    method = DynamicPromptLearning(
        chosen,
        inner_steps=inner_steps,
        null_steps=null_steps,
        steps=steps,
        guidance=guidance,
        warm_start=warm_start,
    )
    pipe = diffusion.load(model)
    method.find(pipe, caption)
    folder = diffusion.make_folder(out)
    made, seconds = _make(
        pipe, method, picture, caption, target, weights, local if blend else None, folder
    )
    result = _result(model, caption, target, weights, method, made, seconds)
    _write(folder, picture, result, made)
    write_json(result, json)
    if not made["learnt"][0].ground.any():
        err().print("note: no background was found, so its loss had nothing to do")
    if blend and local is not None and None in result["outside"].values():
        err().print("note: the edited words are looked at everywhere, so no part had to stay")
    if json is None or str(json) != "-":
        print(f"nouns: {', '.join(repr(n) for n in chosen)}; edit: {target!r}")
        for name in NAMES:
            inside, outside = result["inside"][name], result["outside"][name]
            where = (
                f"of the picture {inside:.4f} of 1"  # nothing says which part was to stay
                if outside is None
                else f"outside the edited words {outside:.4f} of 1, inside {inside:.4f}"
            )
            again = result["reconstruction"][name]
            print(f"{name}: change {where}; reconstruction error {again:.4f}")
        for pair, value in result["leakage"]["after"]["pairs"].items():
            before = result["leakage"]["before"]["pairs"][pair]
            print(f"overlap of maps, {pair}: {before:.3f} before, {value:.3f} after")
        print(f"page: {folder / 'index.html'}")


def wanted(
    caption: str, edit: str | None, refine: str | None, reweight: list[str] | None
) -> tuple[str, tuple[str, str] | None]:
    """The edit's caption, and the words of source and edit that may change the picture.

    >>> wanted("a red circle", "red -> blue", None, None)
    ('a blue circle', ('red', 'blue'))

    Raises:
        InputError: no edit, two edits, or words that are not in the caption exactly once.
    """
    if edit is not None and refine is not None:
        raise InputError("--edit and --refine are two ways to say it: give one")
    if refine is not None:
        return diffusion.check_prompt(refine), None
    if edit is None:
        if not reweight:
            raise InputError("say what to change: --edit, --refine or --reweight")
        return caption, None
    old, arrow, new = (part.strip() for part in edit.partition("->"))
    if not (old and arrow and new):
        raise InputError(f'--edit is "old words -> new words", not {edit!r}')
    import re

    places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(old)}(?!\w)", caption)]
    if len(places) != 1:
        times = "is not in" if not places else f"stands {len(places)} times in"
        raise InputError(f"{old!r} {times} the caption {caption!r}: name words that are there once")
    start, end = places[0]
    return caption[:start] + new + caption[end:], (old, new)


def factors(given: list[str] | None) -> dict[str, float]:
    """ "word=2.0" as a table.

    >>> factors(["red=2", "circle=0.5"])
    {'red': 2.0, 'circle': 0.5}
    """
    made = {}
    for one in given or []:
        word, _, number = one.rpartition("=")
        try:
            made[word.strip()] = float(number)
        except ValueError:
            word = ""
        if not word.strip():
            raise InputError(f"--reweight is word=2.0, not {one!r}")
    return made


def found_nouns(caption: str) -> list[str]:
    """The last word of each simple noun phrase; "circle (2)" for the second of two. The background
    is no noun of its own: its loss is about all others.

    >>> found_nouns("a red circle and a blue circle on a white background")
    ['circle (1)', 'circle (2)']
    """
    import re

    from regard.parts.text.phrases import noun_phrases

    ends = [(p.end, re.findall(r"\w+", p.text)[-1]) for p in noun_phrases(caption, "rules")]
    ends = [(end, word) for end, word in ends if word.lower() != "background"]
    if not ends:
        raise InputError(f"no noun was found in {caption!r}: name them with --nouns")
    named = []
    for end, word in ends:
        spans = [m.end() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", caption)]
        named.append(f"{word} ({spans.index(end) + 1})" if len(spans) > 1 else word)
    return list(dict.fromkeys(named))


def _make(
    pipe: Any,
    method: Any,
    picture: Any,
    caption: str,
    target: str,
    weights: dict[str, float],
    local: tuple[str, str] | None,
    folder: Path,
) -> tuple[dict[str, tuple[Any, Any]], dict[str, float]]:
    """What was learnt and the edit, without and with learnt nouns."""
    from regard.parts.diffusion.inversion import encode_image
    from regard.progress import bar
    from regard.steer.dynamic_prompt_learning.method import edit

    latents = encode_image(pipe, picture)
    made, seconds = {}, {}
    with bar(6 * method.steps, "inverting, learning, editing") as advance:
        for name in NAMES:
            started = time.perf_counter()
            own = method if name == "learnt" else replace(method, inner_steps=0)
            learned = own.learn(pipe, latents, caption, folder=folder / name, progress=advance)
            edited = edit(pipe, learned, target, weights=weights, local=local, progress=advance)
            made[name] = (learned, edited)
            seconds[name] = time.perf_counter() - started
    return made, seconds


def _result(
    model: str,
    caption: str,
    target: str,
    weights: dict[str, float],
    method: Any,
    made: dict[str, tuple[Any, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    import numpy as np

    def change(a: Any, b: Any, where: Any) -> float:
        one, two = (np.asarray(x, dtype=np.float64) / 255 for x in (a, b))
        return float(abs(one - two)[where].mean()) if where.any() else 0.0

    outside, inside, again = {}, {}, {}
    for name, (learned, edited) in made.items():
        mask = np.ones(edited.image.size[::-1], dtype=bool)
        if edited.mask is not None:
            small = edited.mask.cpu().numpy()
            times = [n // m for n, m in zip(mask.shape, small.shape)]
            mask = small.repeat(times[0], 0).repeat(times[1], 1)
        # where the whole picture may change there is no outside
        outside[name] = None if mask.all() else change(edited.source, edited.image, ~mask)
        inside[name] = change(edited.source, edited.image, mask)
        again[name] = float(learned.losses[-1]["error"])
    learned = made["learnt"][0]
    return {
        "caption": caption,
        "target": target,
        "weights": weights,
        "nouns": learned.nouns,
        "outside": outside,
        "inside": inside,
        "reconstruction": again,
        "leakage": learned.leakage(),
        "losses": learned.losses,
        "seconds": seconds,
        "settings": {"model": model, **asdict(method)},
    }


def _write(
    folder: Path, picture: Any, result: dict[str, Any], made: dict[str, tuple[Any, Any]]
) -> None:
    from regard.files import write_bytes, write_text
    from regard.report.contact import figure, heat, page, png, sheet

    images = [
        [picture, edited.source, edited.image] for _, edited in (made[name] for name in NAMES)
    ]
    for name, row in zip(NAMES, images):
        write_bytes(folder / f"{name}-source.png", png(row[1]))
        write_bytes(folder / f"{name}-edit.png", png(row[2]))
    columns = ("picture", "made again", "edit")
    write_bytes(folder / "sheet.png", png(sheet(images, columns, NAMES)))
    learned = made["learnt"][0]
    size = picture.size
    maps = {
        "before": [heat(m.cpu().numpy(), size) for m in learned.before],
        "after": [heat(m.cpu().numpy(), size) for m in learned.maps],
    }
    ground = heat(learned.ground.float().cpu().numpy(), size)
    rows = [[*maps[when], ground] for when in maps]
    names = (*learned.nouns, "background")
    write_bytes(folder / "maps.png", png(sheet(rows, names, list(maps))))
    wide = max(128, picture.width) if picture.width < 512 else None
    sections = {
        name: [figure(one, word, wide) for one, word in zip(row, columns)]
        for name, row in zip(NAMES, images)
    }
    for row, when in zip(rows, maps):
        sections[f"maps {when}"] = [figure(one, word, wide) for one, word in zip(row, names)]
    notes = [
        f"Source: “{result['caption']}”. Edit: “{result['target']}”.",
        "Plain: null-text inversion and Prompt-to-Prompt. Learnt: the nouns learnt at every step "
        "as well.",
    ]
    write_text(folder / "index.html", page(result["target"], notes, sections))


COMMANDS = {"run": run}
