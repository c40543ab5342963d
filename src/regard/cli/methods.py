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
        Path | None,
        typer.Option(metavar="FILE|-", help="Write the catalogue as JSON here; - for stdout."),
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
    from regard.report.document import show
    from regard.report.table import Cell, Column, Table

    cells = []
    for m in rows:
        paper = f"{m.paper.authors} {m.paper.year}, arXiv {m.paper.arxiv}"
        line = (m.slug, m.does, m.reproduction, m.status, m.verb, ", ".join(m.families), paper)
        cells.append([Cell(text, "" if m.status == "available" else "dim") for text in line])
    spare = [Column(name, spare=True) for name in ("status", "verb", "models", "paper")]
    show(Table(["method", "what it does", "reproduced", *spare], cells))
