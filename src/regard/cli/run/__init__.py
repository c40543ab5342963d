"""regard run METHOD: one input with and without a method, side by side; one file a method."""

from __future__ import annotations

import typer

run = typer.Typer(
    help="Run a method on one input, side by side with the plain model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

from . import (  # noqa: E402  (the commands need `run`)
    act,
    dynamic_prompt_learning,
    recycled,
    refam,
    steer,
    structured_diffusion,
    swap_anything,
    task_kv,
    var,
    visiondrop,
)

run.command("act")(act.act)
run.command("steer")(steer.steer)
run.command("task-kv")(task_kv.task_kv)
run.command("structured-diffusion")(structured_diffusion.structured_diffusion)
run.command("recycled-attention")(recycled.recycled)
run.command("var")(var.var)
run.command("visiondrop")(visiondrop.visiondrop)
run.command("refam")(refam.refam)
run.command("dynamic-prompt-learning")(dynamic_prompt_learning.dynamic_prompt_learning)
run.command("swap-anything")(swap_anything.swap_anything)
