"""The typer application: its commands lie in the files beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from regard.cli import (
    bench,
    build,
    calibrate,
    check,
    explain,
    methods,
    models,
    reproduce,
    see,
    train,
    trial,
    zoo,
)
from regard.cli.run import run

app = typer.Typer(
    help="See, steer, shrink and shape the attention of any Transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from regard import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """See, steer, shrink and shape the attention of any Transformer."""


app.command("see")(see.see)
app.command("explain")(explain.explain)
app.command("check")(check.check)
app.command("models")(models.models)
app.command("methods")(methods.methods)
app.command("reproduce")(reproduce.reproduce)
app.add_typer(bench.app, name="bench")
app.add_typer(build.app, name="build")
app.add_typer(run, name="run")
app.add_typer(calibrate.app, name="calibrate")
app.add_typer(trial.app, name="trial")
app.add_typer(train.app, name="train")
app.add_typer(zoo.app, name="zoo")
