"""regard train: new attention, trained side by side with the old."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import check_file
from regard.errors import InputError


def train(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="JSON of all runs; a stopped comparison goes on from it."
        ),
    ] = Path("mma-training.json"),
    model: Annotated[
        str, typer.Option(help="Whose layout and questions: shapes-vlm.")
    ] = "shapes-vlm",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every run.")] = 700,
    batch: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 128,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every arm.")] = 3,
    arms: Annotated[
        str, typer.Option(help="causal, mma, text first; by commas.")
    ] = "causal,mma,text first",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    pool: Annotated[
        int, typer.Option(min=0, help="Draw so many scenes once; 0: new ones every step.")
    ] = 4096,
    tower_minutes: Annotated[
        float,
        typer.Option(
            min=0.01, max=10_000, help="Length of the training of the vision tower, once."
        ),
    ] = 5.0,
    tower_steps: Annotated[
        int | None, typer.Option(min=1, help="Its steps, in place of minutes.")
    ] = None,
) -> None:
    """Train the same small model with a causal mask and with modality-mutual attention.

    The same data, steps, parameters and vision tower; an arm "text first" puts the question before
    the image. Writes accuracies by kind, losses, times, and what image states depend on.

    [bold]Example[/]

      regard train mma --steps 700 --out mma-training.json
    """
    from regard.report.document import show
    from regard.report.table import Table, right
    from regard.zoo.options import pick_device

    from . import train as trainings

    if model != "shapes-vlm":
        raise InputError(
            f"the comparison is made in the layout of shapes-vlm, not {model}: to train a model of "
            'your own with MMA, use regard.MMA(form="mask").on(model) around Trainer.train()'
        )
    check_file(out)
    result = trainings.compare(
        out,
        steps=steps,
        batch=batch,
        seeds=range(seeds),
        arms=[a.strip() for a in arms.split(",") if a.strip()],
        device=pick_device(device),
        pool=pool,
        tower_minutes=tower_minutes,
        tower_steps=tower_steps,
    )
    keys = ("seconds a step", "change by question", "change by answer")
    rows = [
        [name, run["accuracy"]["all"], *(run[key] for key in keys)]
        for name, run in result["runs"].items()
    ]
    columns = [
        "run",
        right("right", "{:.1%}".format),
        right("seconds a step", "{:.3f}".format),
        right("image states change by question", "{:.4g}".format),
        right("by answer", "{:.4g}".format),
    ]
    show(Table(columns, rows))


COMMANDS = {"train": train}
