"""regard zoo: the recipes of the small models that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import write_json
from regard.cli.derive import Commands
from regard.errors import InputError

app = Commands("Train the small models that come with the package again, and read their cards.")


@app.command("train")
def train(
    name: Annotated[str, typer.Argument(help="shapes-vae, shapes-sd, shapes-vlm, ...")],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for the weights; replaced when it is whole."),
    ],
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, max=10_000, help="Length of the training; of the recipe if not."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="End after so many steps, whatever the clock says."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and scenes.")] = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="Scenes a step.")] = None,
    vae: Annotated[
        Path | None, typer.Option(help="Folder of shapes-vae, for what is built on it.")
    ] = None,
    tower: Annotated[
        Path | None, typer.Option(help="Folder of shapes-tower, for what is built on it.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of such a model, to go on from there.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write the record as JSON here; - for stdout."),
    ] = None,
) -> None:
    """Train a model by its recipe, boxed by the clock or by steps.

    Weights are saved every 90 seconds and at the end, always as a whole folder. The same command
    takes up a training that was stopped; one of so many steps ends with the weights that it would
    have had without the stop. A shapes-vae, shapes-sd, shapes-dit or
    shapes-vlm that is whole can be trained on, with --start; a pipeline with --start and --vae is
    moved onto that autoencoder first.

    [bold]Examples[/]

      regard zoo train shapes-vae --out vae --minutes 3 --device cuda

      regard zoo train shapes-sd --vae vae --out shapes-sd --minutes 10 --device cuda
    """
    from regard.cli.common import check_output
    from regard.lab.bench.record import pick_device
    from regard.zoo import train as recipes
    from regard.zoo.train.loop import replaceable

    run = recipes.recipe(name)
    check_output(json)
    out = replaceable(out)
    settings: dict[str, Any] = {"device": pick_device(device), "seed": seed}
    for part, folder in {"vae": vae, "tower": tower, "start": start}.items():
        if part in recipes.TAKES.get(name, ()):
            settings[part] = folder
        elif folder is not None:
            raise InputError(f"{name} is not built on --{part}: leave it out")
    if minutes is not None and steps is not None:
        raise InputError("--minutes and --steps are mutually exclusive")
    if steps is not None:
        settings["steps"] = steps
    if minutes is not None:
        settings["minutes"] = minutes
    if batch is not None:
        settings["batch"] = batch
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(run(out, **settings), json)


@app.command("card")
def card(
    name: Annotated[str, typer.Argument(help="shapes-sd, shapes-dit, shapes-vlm or smol-vlm.")],
) -> None:
    """What a shipped model was trained on, for how long, and how good it is."""
    from rich.markdown import Markdown

    from regard.errors import nearest
    from regard.report.screen import Console
    from regard.zoo.shipped import MODELS, PIPELINES, shipped

    folder = shipped(name)
    if folder is None:
        raise InputError(
            f"{name!r} does not come with the package.{nearest(name, [*MODELS, *PIPELINES])}"
        )
    Console().print(Markdown((folder / "README.md").read_text(encoding="utf-8")))
