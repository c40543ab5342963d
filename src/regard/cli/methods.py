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
    from dataclasses import asdict

    from regard import catalog

    check_output(json)
    if verb is not None and verb not in catalog.VERBS:
        raise InputError(f"unknown verb {verb!r}.{nearest(verb, catalog.VERBS)}")
    rows = [m for m in catalog.methods() if verb in (None, m.verb)]
    extra = ("status", "reproduction", "url")
    write_json([{**asdict(m), **{n: getattr(m, n) for n in extra}} for m in rows], json)
    if json is not None and str(json) == "-":
        return
    from regard.report.document import show
    from regard.report.table import Cell, Column, Table

    cells = []
    for m in rows:
        paper = f"{m.authors} {m.year}, arXiv {m.arxiv}"
        line = (m.slug, m.what, m.reproduction, m.status, m.verb, ", ".join(m.families), paper)
        cells.append([Cell(text, "" if m.status == "available" else "dim") for text in line])
    spare = [Column(name, spare=True) for name in ("status", "verb", "models", "paper")]
    show(Table(["method", "what it does", "reproduced", *spare], cells))
