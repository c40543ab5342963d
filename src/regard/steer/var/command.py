"""regard run var: an answer about a picture with the attention on sinks given to the picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import err, numbers, read_text, write_json
from regard.cli.pages import check_places, check_png
from regard.cli.run import vlm
from regard.errors import InputError
from regard.files import write_bytes

RATIOS = {"general": 0.8, "hallucination": 0.5, "vision-centric": 0.9}


def run(
    prompt: Annotated[str, typer.Option(help="The question itself, or @file.")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be given several times.")],
    model: Annotated[
        str, typer.Option(help="A folder, a hub id or a name of `regard models`.")
    ] = "smol-vlm",
    preset: Annotated[
        str,
        typer.Option(
            help="Least share of sink-free image attention, by task: " + ", ".join(RATIOS)
        ),
    ] = "general",
    nonsink_ratio: Annotated[
        float | None, typer.Option(help="That share itself, instead of the preset.")
    ] = None,
    move: Annotated[float, typer.Option(help="Share of the attention on sinks moved.")] = 0.6,
    image_mass: Annotated[
        float, typer.Option(help="Least attention on the picture of a row that is changed.")
    ] = 0.2,
    tau: Annotated[float, typer.Option(help="A sink's massive dims exceed this.")] = 20.0,
    dims: Annotated[
        str | None,
        typer.Option(help="Massive dims, such as 1415,2533; or auto: find them on this prompt."),
    ] = None,
    rule: Annotated[str, typer.Option(help="paper, or released_code.")] = "paper",
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", min=1, help="Length of the answer.")
    ] = 60,
    chat: Annotated[
        bool, typer.Option(help="Put the question into the model's chat template, if it has one.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Draw sinks and attention on the first picture, as a PNG here."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """VAR: give the attention on sink tokens to the picture, no weight touched.

    Shows the plain and the changed answer, the sinks of every layer, how much was moved, and what
    the last token of the prompt gives the picture, before and after.

    [bold]Examples[/]

      regard run var --image photo.png --prompt "What is left of the red circle?" --out sinks.png

      regard run var --model llava-hf/llava-1.5-7b-hf --image a.png --prompt "What is this?"

      regard run var --model FOLDER --image a.png --prompt "..." --dims auto --tau 12 --out s.png
    """  # fmt: skip
    from regard.parts.vision import locate
    from regard.steer.var.method import Redistribution, find_sink_dims

    if preset not in RATIOS:
        raise InputError(f"--preset is one of {', '.join(RATIOS)}, not {preset!r}")
    check_places(json, out)
    check_png(out)
    named = None if dims in (None, "auto") else numbers(dims, "dims")
    ratio = RATIOS[preset] if nonsink_ratio is None else nonsink_ratio
    settings: dict[str, Any] = {
        "move": move, "nonsink_ratio": ratio, "image_mass": image_mass, "tau": tau, "rule": rule,
    }  # fmt: skip
    Redistribution(dims=named or [0], **settings)  # a wrong setting shows before anything is loaded
    pictures, text = vlm.read_images(image), read_text(prompt)
    loaded, processor = vlm.load_vlm(model)
    inputs = vlm.prepare(loaded, processor, pictures, text, tokens, chat)
    places = locate(loaded, inputs)
    grid = places.grids[0][0] if places.grids[0] else None
    if out is not None:
        vlm.drawable(grid)
    if dims == "auto":
        with vlm.working("looking for massive dims"):
            named = find_sink_dims(loaded, [inputs])
    method = Redistribution(dims=named, **settings)
    with vlm.working("answering, changed"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        changed = vlm.answer(loaded, inputs, tokens, [method])
    with vlm.working("answering, plain"):
        plain = vlm.answer(loaded, inputs, tokens, [])
    result = vlm.compared(processor, plain, changed, "changed")
    result |= {
        "settings": {"model": model, **settings, "dims": list(method.dims_used)},
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "image_tokens": int((places.number[0] >= 0).sum()),
        "grid": None if grid is None else list(grid),
        "layers": _layers(method, places),
        "attention": _attention(method, places),
        "notes": [str(w.message) for w in caught if str(w.message).startswith("VAR: ")],
    }
    if out is not None:
        from regard.report.contact import png

        seen = vlm.seen_by_model(processor, inputs, 0, pictures[0])
        write_bytes(out, png(_drawn(result, seen)))
    write_json(result, json)
    if json is None or str(json) != "-":
        _show(result)
    for note in result["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)


def _layers(method: Any, places: Any) -> list[dict[str, Any]]:
    """Sinks and moved attention of every acting layer."""
    length = places.number.shape[1]
    rows = []
    for layer, found in method.found().items():
        sinks, image = found.sinks[0, :length].cpu(), places.patch[0].cpu() >= 0
        on_image = (sinks & image).nonzero()[:, 0]
        changed = [c[0] for c in found.chosen]
        moved = [m[0][c] for m, c in zip(found.moved, changed)]
        amounts = [float(x) for part in moved for x in part.flatten().tolist()]
        rows.append(
            {
                "layer": layer,
                "text_sinks": (sinks & ~image).nonzero()[:, 0].tolist(),
                "image_sinks": [
                    {"image": int(places.number[0, n]), "patch": int(places.patch[0, n])}
                    for n in on_image.tolist()
                ],
                "rows": sum(int(c.numel()) for c in changed),
                "rows_changed": sum(int(c.sum()) for c in changed),
                "moved": sum(amounts) / len(amounts) if amounts else 0.0,
            }
        )
    return rows


def _attention(method: Any, places: Any) -> dict[str, list[float]]:
    """What the last token of the prompt gives each patch of the first picture, mean over heads and
    acting layers.
    """
    import torch

    at = ((places.number[0] == 0) & (places.patch[0] >= 0)).nonzero()[:, 0]
    at = at[places.patch[0][at].argsort()]
    found = {}
    for name, each in (("before", method.plain), ("after", method.given)):
        means = torch.stack([given[0].mean(0) for given in each.values()]).mean(0)
        found[name] = [float(f"{v:.4g}") for v in means[at].tolist()]
    return found


def _drawn(result: dict[str, Any], picture: Any) -> Any:
    """The picture, its sinks (the redder, the more layers), and the attention on it."""
    import numpy as np

    from regard.report.contact import sheet
    from regard.report.patches import over, paint

    count: dict[int, int] = {}
    for row in result["layers"]:
        for sink in row["image_sinks"]:
            if sink["image"] == 0:
                count[sink["patch"]] = count.get(sink["patch"], 0) + 1
    most = max(len(result["layers"]), 1)
    cells = {n: (220, 20, 20, 80 + round(150 * k / most)) for n, k in count.items()}
    size = vlm.drawable(result["grid"])
    seen = paint(picture, size, {})
    panels = [
        ("what the model sees", seen),
        (f"sink patches ({len(count)})", paint(picture, size, cells)),
    ]
    maps = {n: np.reshape(v[: size[0] * size[1]], size) for n, v in result["attention"].items()}
    top = max(float(m.max()) for m in maps.values())
    panels += [(f"attention {n}", over(seen, m, (0.0, top))) for n, m in maps.items()]
    names, pictures = zip(*panels)
    return sheet([pictures], names)


def _show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    console = vlm.show_answers(result, "changed")
    table = Table(box=box.SIMPLE_HEAD, title="Sinks", title_justify="left")
    for name in ("layer", "text sinks", "image sinks", "rows changed", "attention moved"):
        table.add_column(name, justify="right")
    for row in result["layers"]:
        table.add_row(
            str(row["layer"]),
            str(len(row["text_sinks"])),
            str(len(row["image_sinks"])),
            f"{row['rows_changed']} of {row['rows']}",
            f"{100 * row['moved']:.1f} %",
        )
    console.print(table)
    before, after = (100 * sum(result["attention"][n]) for n in ("before", "after"))
    console.print(
        f"The last token of the prompt gives {before:.1f} % of its attention to the first picture "
        f"before, {after:.1f} % after (mean over heads and acting layers)."
    )


COMMANDS = {"run": run}
