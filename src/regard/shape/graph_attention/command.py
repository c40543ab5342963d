"""regard train adapter: Sparse-GIN beside LoRA of as many parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import load
from regard.errors import InputError
from regard.files import check_folder
from regard.lab.journal import Journal
from regard.zoo.options import Loading


def train(
    kind: Annotated[str, typer.Argument(help="sparse-gin, sparse-gin-reference or lora.")],
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id; stays frozen.")
    ] = "smollm2-135m",
    data: Annotated[
        str, typer.Option(help="Text: novel, python, files, folders or hub:NAME, by commas.")
    ] = "novel",
    beside: Annotated[
        str, typer.Option(help="Adapters trained beside it, by commas; empty for none.")
    ] = "lora",
    hidden: Annotated[int, typer.Option(min=1, help="Width of the graph network.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Blocks a step.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every adapter.")] = 1,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder of the adapters; a stopped comparison goes on."
        ),
    ] = Path("adapters"),
    *,
    loading: Loading,
) -> None:
    """Fine-tune a frozen model with a graph adapter, side by side with LoRA.

    [bold]Example[/]

      regard train adapter sparse-gin --model smollm2-135m --data novel --seeds 3
    """
    from regard.report.document import show
    from regard.report.table import Table, right

    from . import fine_tune

    if not lr > 0:
        raise InputError(f"lr is above 0, not {lr}")
    kinds = list(dict.fromkeys([kind, *filter(None, (b.strip() for b in beside.split(",")))]))
    for one in kinds:
        if one not in fine_tune.KINDS:
            fine_tune.adapters(one, None, hidden, 0)
    out = check_folder(out)
    loaded, tokens = load(model, loading)
    blocks = fine_tune.blocks(data, tokens, context, batch)
    key = {
        "kind": "adapters", "model": model, "data": data, "hidden": hidden, "steps": steps,
        "batch": batch, "context": context, "lr": lr,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    with Journal(out / "adapters.json", key) as journal:
        for seed in range(seeds):
            for one in kinds:
                name = f"{one}-seed{seed}"
                if name not in journal.parts:
                    record = fine_tune.train(
                        one,
                        loaded,
                        blocks,
                        hidden=hidden,
                        steps=steps,
                        batch=batch,
                        rate=lr,
                        seed=seed,
                        out=out / name,
                    )
                    journal.put(name, record)
                runs.append([name, *(journal.parts[name][n] for n in COLUMNS)])
    show(Table(["run", *(right(n) for n in COLUMNS)], runs))


COLUMNS = ("parameters", "before", "loss", "train_loss")
COMMANDS = {"train adapter": train}
