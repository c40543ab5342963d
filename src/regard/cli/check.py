"""regard check: prove that the door into a model is sound, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import check_output, count, load, working, write_json

COLORS = {"ok": "green", "failed": "bold red", "n/a": "dim"}


def check(
    model: Annotated[str, typer.Argument(help="A name of `regard models`, a folder or a hub id.")],
    tokens: Annotated[str, typer.Option(help="Length of the random input.")] = "24",
    json: Annotated[
        Path | None, typer.Option(help="Write the findings as JSON here; - for stdout.")
    ] = None,
) -> None:
    """Prove that regard sees this model truly; exit code 0 if every check holds, 1 if one fails.

    Which layers are reached, which mask is truly used, facts against the dense map, prefill against
    decoding, a padded batch against each row alone, and that nothing is left behind.

    [bold]Example[/]

      regard check smollm2-135m
    """
    from regard.lab.check import check as run

    length = count(tokens)
    check_output(json)
    loaded, _ = load(model)
    with working("checking"):
        report = run(loaded, tokens=length)
    write_json(report.as_dict(), json)
    if json is None or str(json) != "-":
        from regard.report.document import show
        from regard.report.table import Cell, Table

        rows = [[f.what, Cell(f.status, COLORS[f.status]), f.detail] for f in report.findings]
        show(Table(["check", "result", "what was found"], rows, f"{model} ({report.model})"))
    raise typer.Exit(0 if report.ok else 1)
