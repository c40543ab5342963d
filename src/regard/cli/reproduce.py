"""regard reproduce: measure a paper's claims on this machine, and say which hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import err
from regard.errors import InputError, nearest
from regard.zoo.options import Loading


def reproduce(
    method: Annotated[
        str, typer.Argument(help="A method of `regard methods`, for example sink-emergence.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A name of `regard models`, a folder or a hub id; the method's own."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer samples: a look, not a result.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the result; reproductions of the clone, or of the working folder.",
        ),
    ] = None,
    *,
    loading: Loading,
) -> None:
    """Rerun the claims of a paper that this machine can measure, with control, interval and
    verdict.

    The rule that turns numbers into a verdict is part of each claim and older than the run; a
    claim that does not hold is reported as not reproduced.

    [bold]Example[/]

      regard reproduce sink-emergence
    """
    from regard import catalog
    from regard.lab import reproduce as harness
    from regard.lab.reproduce.harness import results_folder
    from regard.report.screen import Console

    known = harness.available()
    if method not in known:
        slugs = [m.slug for m in catalog.methods()]
        if method in slugs:
            raise InputError(f"{method} cannot be reproduced yet: {', '.join(known)} can")
        raise InputError(f"unknown method {method!r}.{nearest(method, slugs)}")
    folder = results_folder() if out is None else out
    result = harness.run(method, quick=quick, model=model, loading=loading, out=folder)
    Console().print(harness.table(result))
    place = folder / f"{method}{'.quick' if quick else ''}.json"
    err().print(f"result: {place}", markup=False, highlight=False, soft_wrap=True)
