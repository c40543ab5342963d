"""regard check: watching leaves a model's outputs unchanged, and facts match eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import check_output, count, load, working, write_json
from regard.zoo.options import Loading, placed

COLORS = {"ok": "green", "failed": "bold red", "n/a": "dim"}


def check(
    model: Annotated[str, typer.Argument(help="A name of `regard models`, a folder or a hub id.")],
    tokens: Annotated[str, typer.Option(help="Length of the random input.")] = "24",
    json: Annotated[
        Path | None, typer.Option(help="Write the findings as JSON here; - for stdout.")
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
    """
    from regard.lab.check import check as run

    length = count(tokens)
    check_output(json)
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
