"""The typer application: the commands of the files beside this one, and those of the methods."""

from __future__ import annotations

from typing import Annotated

import typer

from regard import catalog
from regard.cli import bench, check, methods, models, reproduce, see, trial, zoo
from regard.cli.derive import Commands
from regard.cli.run import derived, with_examples

app = Commands(
    "See, steer, shrink and shape the attention of any Transformer.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GROUPS = {
    "run": Commands("Run a method on one input, side by side with the plain model."),
    "trial": trial.app,
    "train": Commands("Train with a new attention and with the old one, all else equal."),
    "calibrate": Commands("Find on labelled data what a method needs to know of a model."),
    "build": Commands("Build a data set with a model, shard by shard; a stopped build goes on."),
    "bench": bench.app,
    "zoo": zoo.app,
}


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
app.command("check")(check.check)
app.command("models")(models.models)
app.command("methods")(methods.methods)
app.command("reproduce")(reproduce.reproduce)
for method in catalog.everything():
    # a method's own commands: "build" is `regard build SLUG`, "bench act" and "explain" as they are
    own = method.load("command").COMMANDS if method.has("command") else {}
    for place, function in own.items():
        group, _, name = place.partition(" ")
        parent = GROUPS.get(group, app)
        word = name or (group if parent is app else method.slug)
        typed = f"regard {word}" if parent is app else f"regard {group} {word}"
        with_examples(function, [e for e in method.examples if e.startswith(typed + " ")])
        parent.command(word)(function)
    if "run" not in own and (command := derived(method)) is not None:
        GROUPS["run"].command(method.slug)(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
