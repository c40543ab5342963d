"""The typer application: the commands of the files beside this one, and those of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from regard import catalog
from regard.cli import check, methods, models, reproduce, see
from regard.cli.derive import Commands
from regard.cli.run import derived, with_examples

GROUPS = {
    "run": "Run a method on one input, side by side with the plain model.",
    "trial": "Judge methods on the same texts, side by side with the plain model.",
    "train": "Train with a new attention and with the old one, all else equal.",
    "calibrate": "Find on labelled data what a method needs to know of a model.",
    "build": "Build a data set with a model, shard by shard; a stopped build goes on.",
    "bench": "Measure what things cost, in one run and one table.",
    "zoo": "Train the small models that come with regard, and read their cards.",
}


def build(words: Sequence[str] | None = None) -> Commands:
    """The application, with the commands of methods as the catalogue finds them now.

    Args:
        words: what was typed; the groups that it does not name stay empty. All when None.
    """
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
    named = next((w for w in words if not w.startswith("-")), "") if words is not None else None
    groups = {name: Commands(help) for name, help in GROUPS.items()}
    for name, group in groups.items():
        if named in (None, name) and name in ("bench", "trial", "zoo"):
            known = import_module(f"regard.cli.{name}").app
            group.registered_commands += known.registered_commands
            group.registered_groups += known.registered_groups
    for method in catalog.everything():
        if method.card.command or named is None or named in groups:
            _add(method, app, groups)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def _add(method: catalog.Method, app: Commands, groups: dict[str, Commands]) -> None:
    """The commands of one method: "build" in its `COMMANDS` is `regard build SLUG`, "bench act" and
    "explain" are taken as they are.
    """
    commands = method.load("command").COMMANDS if method.has("command") else {}
    for place, function in commands.items():
        group, _, name = place.partition(" ")
        parent = groups.get(group, app)
        word = name or (group if parent is app else method.slug)
        typed = f"regard {word} " if parent is app else f"regard {group} {word} "
        examples = [e for e in method.examples if e.startswith(typed)]
        parent.command(word, help=with_examples(function, examples))(function)
    if "run" not in commands and (command := derived(method)) is not None:
        groups["run"].command(method.slug)(command)


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
