"""regard check: watching leaves a model's outputs unchanged, and facts match eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from regard.cli.common import check_output, count, load, working, write_json
from regard.errors import InputError
from regard.zoo.options import Loading, placed

COLORS = {"ok": "green", "failed": "bold red", "n/a": "dim"}


def check(
    model: Annotated[
        str | None, typer.Argument(help="A name of `regard models`, a folder or a hub id.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Length of the random input.")] = "24",
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write the findings as JSON here; - for stdout."),
    ] = None,
    all_architectures: Annotated[
        bool,
        typer.Option(
            "--all-architectures",
            help="Check the smallest random model of every class of transformers.",
        ),
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Classes whose kind or name this regular expression finds.")
    ] = None,
    *,
    loading: Loading,
) -> None:
    """Check that watching leaves outputs unchanged and facts match eager attention.

    Exit code 0 if every check holds, 1 if one fails.

    Which layers are reached, which mask is truly used, facts against the dense map, prefill against
    decoding, a padded batch against each row alone, and that nothing is left behind.

    [bold]Example[/]

      regard check smollm2-135m
      regard check --all-architectures --only "^vision" --json vision.json
    """
    check_output(json)
    if all_architectures:
        if model is not None:
            raise InputError("--all-architectures builds its own models: leave MODEL out")
        _architectures(only, json)
    if model is None:
        raise InputError("name a model to check, or add --all-architectures")
    if only is not None:
        raise InputError("--only chooses among classes: add --all-architectures")
    from regard.lab.check import check as run

    length = count(tokens)
    loaded, _ = load(model, loading)
    with working("checking"):
        report = run(loaded, tokens=length)
    write_json({**report.as_dict(), "on": placed(loaded)}, json)
    if json is None or str(json) != "-":
        from regard.report.document import show
        from regard.report.table import Cell, Table

        rows = [[f.what, Cell(f.status, COLORS[f.status]), f.detail] for f in report.findings]
        show(
            Table(
                ["check", "result", "what was found"],
                rows,
                f"{model} ({report.model}, {placed(loaded)})",
            )
        )
    raise typer.Exit(0 if report.ok else 1)


def _architectures(only: str | None, json: Path | None) -> NoReturn:
    from regard.lab import architectures
    from regard.progress import bar

    chosen = architectures.classes(only)
    with bar(len(chosen), "classes") as step:
        outcomes = list(architectures.sweep(chosen, step))
    write_json(architectures.result(outcomes), json)
    if json is None or str(json) != "-":
        from regard.report.document import show

        show(architectures.table(outcomes))
    raise typer.Exit(int(any(o.result == architectures.WRONG for o in outcomes)))
