"""regard methods: the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import check_output, write_json
from regard.errors import InputError, nearest


def methods(
    verb: Annotated[
        str | None, typer.Argument(help="Only this verb: see, steer, shrink, shape, bench.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the catalogue as JSON here; - for stdout.")
    ] = None,
) -> None:
    """List the published methods: what each is for, its paper, and whether it is built and
    reproduced here.
    """
    from regard import catalog
    from regard.cards import VERBS

    check_output(json)
    if verb is not None and verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}.{nearest(verb, VERBS)}")
    rows = [m for m in catalog.methods() if verb in (None, m.verb)]
    write_json([m.as_dict() for m in rows], json)
    if json is not None and str(json) == "-":
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    table.add_column("method", no_wrap=True)
    table.add_column("verb")
    for column in ("what it does, on which models", "paper", "status", "reproduced"):
        table.add_column(column, overflow="fold")
    for m in rows:
        what = Text.assemble(m.does, ("\n" + ", ".join(m.families), "dim"))
        cells = (
            f"{m.paper.authors} {m.paper.year}\narXiv {m.paper.arxiv}",
            m.status,
            m.reproduction,
        )
        table.add_row(m.slug, m.verb, what, *cells, style="" if m.status == "available" else "dim")
    Console().print(table)
