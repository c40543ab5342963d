"""The typer application: the commands of the files beside this one, and those of the methods."""

from __future__ import annotations

from typing import Annotated

import typer

from regard import catalog
from regard.cli import bench, check, methods, models, reproduce, see, trial, zoo
from regard.cli.derive import Commands
from regard.cli.run import derived


def build() -> Commands:
    """The application with every command, those of the methods as the catalogue finds them now."""
    app = Commands(
        "See, steer, shrink and shape the attention of any Transformer.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command("see")(see.see)
    app.command("check")(check.check)
    app.command("models")(models.models)
    app.command("methods")(methods.methods)
    app.command("reproduce")(reproduce.reproduce)
    groups = {
        "run": Commands("Run a method on one input, side by side with the plain model."),
        "trial": Commands("Judge methods on the same texts, side by side with the plain model."),
        "train": Commands("Train with a new attention and with the old one, all else equal."),
        "calibrate": Commands("Find on labelled data what a method needs to know of a model."),
        "build": Commands(
            "Build a data set with a model, shard by shard; a stopped build goes on."
        ),
        "bench": Commands("Measure what things cost, in one run and one table."),
        "zoo": Commands("Train the small models that come with regard, and read their cards."),
    }
    for group, known in (("bench", bench.app), ("trial", trial.app), ("zoo", zoo.app)):
        groups[group].registered_commands += known.registered_commands
        groups[group].registered_groups += known.registered_groups
    for method in catalog.everything():
        # "build" is `regard build SLUG`; "bench act" and "explain" are taken as they are
        own = method.load("command").COMMANDS if method.has("command") else {}
        for place, function in own.items():
            group, _, name = place.partition(" ")
            parent = groups.get(group, app)
            parent.command(name or (group if parent is app else method.slug))(function)
        if "run" not in own and (command := derived(method)) is not None:
            groups["run"].command(method.slug)(command)
    for name, group_app in groups.items():
        app.add_typer(group_app, name=name)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from regard import __version__

        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """See, steer, shrink and shape the attention of any Transformer."""
