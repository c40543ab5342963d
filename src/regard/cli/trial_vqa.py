"""regard trial vqa: questions about drawn scenes, with and without methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import check_output, load, write_json
from regard.errors import InputError
from regard.zoo.options import Loading, placed

MODEL = "shapes-vlm"


def vqa(
    model: Annotated[
        str | None,
        typer.Option(
            help="A name of `regard models`, a folder or a hub id; if not given, shapes-vlm, or "
            "the model that the methods are shown on."
        ),
    ] = None,
    with_: Annotated[
        str,
        typer.Option(
            "--with", help="Methods, settings after a colon: var:tau=12,visiondrop:tokens=16."
        ),
    ] = "",
    kinds: Annotated[
        str, typer.Option(help="Kinds of question by commas, or all.")
    ] = "existence,color,relation",
    questions: Annotated[int, typer.Option(min=1, help="Questions of each kind.")] = 40,
    held_out: Annotated[
        bool, typer.Option(help="Only scenes with a pair of colour and shape never trained on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of scenes and questions.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions read at once.")] = 16,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", "--out", metavar="FILE|-", help="Write everything as JSON here; - for stdout."
        ),
    ] = None,
    *,
    loading: Loading,
) -> None:
    """How many questions about drawn scenes stay right under each method.

    Existence asks for things that are not there, too; "existence probe" counts those whose colour
    and shape are both in the picture, but apart.

    [bold]Examples[/]

      regard trial vqa --with var:tau=12,visiondrop:tokens=16

      regard trial vqa --with visiondrop:tokens=16,visiondrop:tokens=16,score=text --kinds all
    """
    from regard import watching as api
    from regard.lab.trials import vqa as trial
    from regard.lab.trials.configurations import read
    from regard.progress import bar

    check_output(json)
    configurations = read(with_)
    if model is None:
        shown_on = [part.entry.card.model for one in configurations for part in one.parts]
        model = next((name for name in shown_on if name != MODEL), MODEL)
    wanted = trial.KINDS if kinds == "all" else tuple(k.strip() for k in kinds.split(","))
    given = trial.items(questions, wanted, seed=seed, held_out=True if held_out else None)
    loaded, processor = load(model, loading)
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"{model} reads no pictures: name a vision-language model")
    for one in configurations:
        api.apply(loaded, *one.handlers(0))  # refuses what cannot work, before any work
    result: dict[str, Any] = {
        "model": model,
        "on": placed(loaded),
        "settings": {"kinds": list(wanted), "questions": questions, "seed": seed,
                     "held_out": held_out},
        "configurations": {},
    }  # fmt: skip
    steps = len(configurations) * -(-len(given) // batch_size)
    with bar(steps, "answering") as advance:
        for one in configurations:

            def method(one: Any = one) -> Any:
                return api.apply(loaded, *one.handlers(0))

            scores = trial.score(
                loaded, processor, given, method if one.parts else None, batch_size=batch_size,
                advance=advance,
            )  # fmt: skip
            result["configurations"][one.key] = trial.summary(given, scores)
            write_json(result, json if json is not None and str(json) != "-" else None)
    if json is not None and str(json) == "-":
        write_json(result, json)
        return
    _show(result)


def _show(result: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.table import Table, right

    names = list(next(iter(result["configurations"].values())))

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['right']:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        [key, *(cell(found[name]) for name in names)]
        for key, found in result["configurations"].items()
    ]
    title = f"{result['model']}: right answers, 95 % interval"
    counts = next(iter(result["configurations"].values()))
    asked = ", ".join(f"{n} {counts[n]['asked']}" for n in names)
    show(Table(["configuration", *map(right, names)], rows, title, f"Asked: {asked}.", keys=1))
