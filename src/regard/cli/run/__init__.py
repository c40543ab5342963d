"""regard run METHOD: one input with and without a method, side by side; one file a method."""

from __future__ import annotations

import typer

run = typer.Typer(
    help="Run a method on one input, side by side with the plain model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

from . import act, steer  # noqa: E402  (the commands need `run`)

run.command("act")(act.act)
run.command("steer")(steer.steer)
