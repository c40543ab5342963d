"""regard models: what `--model` takes by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import check_output, write_json


def models(
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write the list as JSON here; - for stdout."),
    ] = None,
) -> None:
    """List the models that have a name here; any folder or hub id of a checkpoint works as well."""
    from dataclasses import asdict

    from regard import zoo
    from regard.zoo.shipped import MODELS, PIPELINES

    check_output(json)
    entries = zoo.models()
    own = [
        {"name": name, "what": what, "licence": "Apache-2.0", "source": "comes with regard"}
        for name, what in {**MODELS, **PIPELINES}.items()
    ]
    write_json([*(asdict(e) for e in entries), *own], json)
    if json is not None and str(json) == "-":
        return
    from regard.report.document import show
    from regard.report.table import Table

    rows = [[e.name, e.what, e.parameters, e.licence, e.source] for e in entries]
    rows += [[one["name"], one["what"], "", one["licence"], one["source"]] for one in own]
    show(Table(["name", "what", "parameters", "licence", "comes from"], rows))
