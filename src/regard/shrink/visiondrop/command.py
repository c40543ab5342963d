"""regard run visiondrop: an answer about a picture from a few of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import read_text, write_json
from regard.cli.pages import check_places, check_png
from regard.cli.run import vlm
from regard.files import write_bytes


def run(
    prompt: Annotated[str, typer.Option(help="The question itself, or @file.")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be given several times.")],
    model: Annotated[
        str, typer.Option(help="A folder, a hub id or a name of `regard models`.")
    ] = "shapes-vlm",
    tokens: Annotated[
        float, typer.Option(help="Tokens of a picture, averaged over the layers; below 1 a share.")
    ] = 0.25,
    score: Annotated[str, typer.Option(help="visual, text or random.")] = "visual",
    stages: Annotated[str, typer.Option(help="progressive, encoder or fastv.")] = "progressive",
    merge: Annotated[bool, typer.Option(help="Merge the others into a few tokens.")] = True,
    positions: Annotated[str, typer.Option(help="auto, renumber or keep.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of --score random.")] = 0,
    answer: Annotated[int, typer.Option("-n", "--answer", min=1, help="Length of it.")] = 60,
    chat: Annotated[
        bool, typer.Option(help="Put the question into the model's chat template, if it has one.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Draw what each cut left of the first picture, as a PNG.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """VisionDrop: drop and merge the tokens of a picture in stages, no weight touched.

    Shows the plain and the changed answer, what every cut left, the time of reading the prompt and
    the bytes of its keys and values.

    [bold]Examples[/]

      regard run visiondrop --image photo.png --prompt "What color is the circle?" --tokens 32 --out kept.png

      regard run visiondrop --model llava-hf/llava-1.5-7b-hf --image a.png --prompt "What is this?" --tokens 64

      regard run visiondrop --model FOLDER --image a.png --prompt "..." --tokens 0.25 --out kept.png
    """  # noqa: E501
    from regard.parts.vision import locate
    from regard.shrink.visiondrop.method import VisionDrop

    check_places(json, out)
    check_png(out)
    settings: dict[str, Any] = {
        "tokens": tokens, "score": score, "stages": stages, "merge": merge,
        "positions": positions, "seed": seed,
    }  # fmt: skip
    method = VisionDrop(**settings)
    pictures, text = vlm.read_images(image), read_text(prompt)
    loaded, processor = vlm.load_vlm(model)
    inputs = vlm.prepare(loaded, processor, pictures, text, answer, chat)
    places = locate(loaded, inputs)
    grids = places.grids[0]
    if out is not None:
        vlm.drawable(grids[0] if grids else None)
    with vlm.working("answering, changed"):
        changed = vlm.answer(loaded, inputs, answer, [method])
        fast = vlm.prefill(loaded, inputs, [method])
    with vlm.working("answering, plain"):
        plain = vlm.answer(loaded, inputs, answer, [])
        full = vlm.prefill(loaded, inputs, [])
    result = vlm.compared(processor, plain, changed, "changed")
    result |= {
        "settings": {"model": model, **settings},
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "image_tokens": [b - a for a, b in places.spans(0)],
        "mean_tokens": method.mean_tokens(),
        "tokens_by_layer": method.counts(),
        "prefill_seconds": {"plain": full[0], "changed": fast[0]},
        "cache_bytes": {"plain": full[1], "changed": fast[1]},
        "grids": [None if g is None else list(g) for g in grids],
        "images": [[_told(cut) for cut in cuts] for cuts in method.kept()[0]],
    }
    if out is not None:
        from regard.report.contact import png

        seen = vlm.seen_by_model(processor, inputs, 0, pictures[0])
        write_bytes(out, png(_drawn(result, seen)))
    write_json(result, json)
    if json is None or str(json) != "-":
        _show(result)


def _told(cut: Any) -> dict[str, Any]:
    """What one cut left: of every token the patches it stands for."""
    groups = [list(g) for g in cut.groups]
    return {"before_layer": cut.layer, "dominant": cut.dominant, "tokens": groups}


def _drawn(result: dict[str, Any], picture: Any) -> Any:
    """One panel a cut: kept patches as they are, merged ones tinted by their token."""
    from regard.report.contact import sheet
    from regard.report.patches import GONE, Colour, paint

    size = vlm.drawable(result["grids"][0])
    panels = [("what the model sees", paint(picture, size, {}))]
    for cut in result["images"][0]:
        cells: dict[int, Colour] = dict.fromkeys(range(size[0] * size[1]), GONE)
        for n, patches in enumerate(cut["tokens"]):
            merged = n >= cut["dominant"] or len(patches) > 1
            for patch in patches:
                if merged:
                    tint = (97 * (n + 1)) % 200 + 30
                    cells[patch] = (tint, (tint * 3) % 200 + 30, 255 - tint, 150)
                else:
                    cells.pop(patch, None)
        where = "the encoder" if cut["before_layer"] == 0 else f"layer {cut['before_layer']}"
        title = f"{where}: {len(cut['tokens'])} tokens"
        panels.append((title, paint(picture, size, cells)))
    names, pictures = zip(*panels)
    return sheet([pictures], names)


def _show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    console = vlm.show_answers(result, "changed")
    table = Table(box=box.SIMPLE_HEAD, title="What the cuts left", title_justify="left")
    for name in ("picture", "cut", "tokens", "kept", "merged"):
        table.add_column(name, justify="right")
    for number, cuts in enumerate(result["images"], 1):
        for cut in cuts:
            at = "encoder" if cut["before_layer"] == 0 else f"layer {cut['before_layer']}"
            count = len(cut["tokens"])
            table.add_row(
                str(number), at, str(count), str(cut["dominant"]), str(count - cut["dominant"])
            )
    console.print(table)
    time, held = result["prefill_seconds"], result["cache_bytes"]
    console.print(
        f"{result['mean_tokens']:.1f} tokens a picture averaged over the layers. Reading the "
        f"prompt: {time['plain']:.3f} s plain, {time['changed']:.3f} s changed. Keys and values: "
        f"{held['plain']:,} and {held['changed']:,} bytes."
    )


COMMANDS = {"run": run}
