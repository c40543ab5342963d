"""regard train grpo: reinforcement learning with credit for tokens, by TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import check_file
from regard.errors import InputError
from regard.files import check_folder
from regard.zoo.options import Loading

from .card import CreditSettings


def grpo(
    credit: CreditSettings,
    loading: Loading,
    model: Annotated[
        str, typer.Option(help="A folder or hub id; small: a model of letters, taught first.")
    ] = "small",
    env: Annotated[
        str, typer.Option(help="countdown, arithmetic, or a task of reasoning-gym.")
    ] = "countdown",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Completions a device and step.")] = 64,
    generations: Annotated[int, typer.Option(min=2, help="Completions a prompt.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Gradient accumulation steps.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Longest completion.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate.")] = 1e-4,
    kl: Annotated[float, typer.Option(min=0, help="Weight of the KL term.")] = 0.0,
    signs: Annotated[
        str, typer.Option(help="Advantages that are weighted: both, positive, negative.")
    ] = "both",
    taught: Annotated[
        int, typer.Option(min=0, help="Supervised steps of the small model before.")
    ] = 300,
    lora: Annotated[int, typer.Option(min=0, help="Rank of a LoRA adapter; 0 trains all.")] = 0,
    vllm: Annotated[bool, typer.Option(help="Generate with vLLM, where it is installed.")] = False,
    run_seed: Annotated[int, typer.Option(min=0, help="Seed of the training.")] = 0,
    check_every: Annotated[
        int, typer.Option(min=0, help="Steps between accuracies on new tasks; 0: at the ends.")
    ] = 0,
    checked: Annotated[int, typer.Option(min=1, help="New tasks of an accuracy.")] = 128,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON of the run.")] = Path("grpo.json"),
    save: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the trained model.")
    ] = None,
) -> None:
    """Train with GRPO, tokens weighted by the rhythm of attention.

    Credits: coupled, local, global, and the controls uniform, random, bottom, bottom-local,
    entropy. Run it under `accelerate launch -m regard train grpo ...` for several devices.
    """
    from .train import SIGNS, Run, train

    check_file(out)
    if save is not None:
        check_folder(save)
    if signs not in SIGNS:
        raise InputError(f"--signs is one of {', '.join(SIGNS)}, not {signs}")
    if batch * accumulate % generations:
        raise InputError(
            f"--batch times --accumulate ({batch * accumulate}) is a multiple of --generations "
            f"({generations})"
        )
    run = Run(
        model=model, env=env, steps=steps, batch=batch, generations=generations, tokens=tokens,
        accumulate=accumulate, rate=rate, kl=kl, signs=signs, taught=taught, lora=lora, vllm=vllm,
        seed=run_seed, check_every=check_every, checked=checked,
    )  # fmt: skip
    result = train(run, credit, loading, save)
    _show(result, out)


def _show(result: dict[str, Any], out: Path) -> None:
    import json

    from regard.files import write_text
    from regard.report.document import show
    from regard.report.table import Table, right

    write_text(out, json.dumps(result, indent=1) + "\n")
    columns = ["step", right("accuracy", "{:.3f}".format)]
    show(Table(columns, [[str(n), share] for n, share in result["accuracy"]]))
    show(
        f"credit {result['settings']['credit']['credit']}: mean weight "
        f"{result['mean weight']:.3f}; it took {100 * result['credit share']:.1f} % of the time."
    )


COMMANDS = {"train grpo": grpo}
