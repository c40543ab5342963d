"""regard run steer: synthetic text by a guided expert, away from what is there already."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import err, load, read_text, working
from regard.cli.pages import check_places
from regard.cli.run import shown
from regard.errors import InputError
from regard.files import write_text


def run(
    expert: Annotated[
        str, typer.Option(help="Folder of a PEFT adapter or of a model, or the shipped austen.")
    ] = "austen",
    base: Annotated[
        str | None,
        typer.Option(help="The model the expert was tuned from; smollm2-135m for an adapter."),
    ] = None,
    negatives: Annotated[
        Path | None, typer.Option(help="Examples to stay away from, one a line.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Task prompt, or @file; that of austen when left out.")
    ] = None,
    gamma: Annotated[float, typer.Option(help="The expert's lead over the base.")] = 0.5,
    eta: Annotated[float, typer.Option(help="The push away from the negatives.")] = 0.2,
    alpha: Annotated[
        float, typer.Option(help="Bar of plausibility, 0.05 to 0.1 with a large --eta; 0 is off.")
    ] = 0.0,
    k: Annotated[int, typer.Option(min=1, help="Examples in a negative prompt.")] = 10,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Samples.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Longest sample.")] = 40,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples at once; these do not see each other.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the samples here as JSONL; goes on if interrupted.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="All as one JSON; - for stdout.")] = None,
) -> None:
    """STEER: domain text from an expert, stronger than it is, that does not repeat the examples.

    Every sample joins the pool that later negative prompts are drawn from.

    [bold]Examples[/]

      regard run steer --negatives seen.txt --gamma 0.5 --eta 0.2 -n 20 --out synth.jsonl

      regard run steer --expert my-lora --base my-model --prompt "Review:" --eta 0
    """
    from regard.lab.answers import noted
    from regard.steer.steer.method import sample
    from regard.zoo.expert import prompt as task

    check_places(json, out)
    if prompt is None and expert != "austen":
        raise InputError("an expert of your own needs its task: give --prompt")
    pool = _lines(negatives)
    if eta and negatives is not None and not pool:
        raise InputError(f"{negatives} holds no example: write one a line, or set --eta 0")
    if eta and not pool:
        raise InputError("--eta above 0 needs examples to stay away from: --negatives FILE")
    content = task() if prompt is None else read_text(prompt)
    settings = {
        "expert": expert,
        "base": base,
        "prompt": content,
        "gamma": gamma,
        "eta": eta,
        "alpha": alpha,
        "k": k,
        "tokens": tokens,
        "batch": batch,
        "seed": seed,
        "negatives": pool.copy(),
        "count": count,
    }
    part = None if out is None else out.with_name(f".{out.name}.partial")
    done = _resume(part, settings, pool)
    with noted("STEER") as notes:
        tuned, amateur, tokenizer = _models(expert, base, gamma)
        made = sample(
            tuned,
            tokenizer,
            content,
            pool,
            count=count,
            base=amateur,
            gamma=gamma,
            eta=eta,
            k=k,
            alpha=alpha,
            tokens=tokens,
            batch=batch,
            seed=seed,
            start=len(done),
        )
        _collect(made, done, count, batch, part, settings)
    if out is not None and part is not None:
        write_text(out, "".join(map(_row, done)))
        part.unlink(missing_ok=True)
    result = {"settings": settings, "samples": done, "notes": notes}
    shown.finish(result, json, lambda made: _show(made["samples"], out))


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise InputError(f"there is no file {path}: name a text file, one example a line")
    try:
        rows = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it") from None
    return [row.strip() for row in rows if row.strip()]


def _models(expert: str, base: str | None, gamma: float) -> tuple[Any, Any, Any]:
    """Expert, base (None: the expert's adapter switched off), tokenizer."""
    from regard.zoo.expert import BASE, load_expert

    if (Path(expert).expanduser() / "config.json").is_file():
        if base is None and gamma:
            raise InputError(f"{expert} is a whole model: give --base, what it was tuned from")
        model, tokenizer = load(expert)
        amateur = load(base)[0] if base and gamma else None
    else:
        with working(f"loading {expert}"):
            model, tokenizer = load_expert(expert, base or BASE)
        amateur = None
    if tokenizer is None:
        raise InputError(f"{expert} carries no tokenizer: save it beside the weights")
    return model, amateur, tokenizer


def _row(row: dict[str, Any]) -> str:
    return jsonlib.dumps(row, ensure_ascii=False) + "\n"


def _resume(part: Path | None, settings: dict[str, Any], pool: list[str]) -> list[dict[str, Any]]:
    """The samples of an interrupted run of the same settings, whole batches only."""
    if part is None or not part.is_file():
        return []
    try:
        lines = part.read_text("utf-8").split("\n")  # a sample may hold what splitlines() cuts at
        first, *rows = [jsonlib.loads(line) for line in lines if line]
    except ValueError:
        return []
    if first != settings:
        return []
    rows = rows[: len(rows) - len(rows) % settings["batch"]]
    pool += [row["text"] for row in rows if row["text"]]
    return rows


def _collect(
    made: Any,
    done: list[dict[str, Any]],
    count: int,
    batch: int,
    part: Path | None,
    settings: dict[str, Any],
) -> None:
    """Sample under a progress bar; what is there is written after every batch."""
    from rich.progress import track

    console = err()
    left = count - len(done)
    shown = track(made, "samples", total=left, console=console, disable=not console.is_terminal)
    for found in shown:
        done.append(found.as_dict())
        if part is not None and (len(done) % batch == 0 or len(done) == count):
            write_text(part, _row(settings) + "".join(map(_row, done)))


def _show(rows: list[dict[str, Any]], out: Path | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if out is not None:
        console.print(Text(f"{len(rows)} samples in {out}"))
        return
    for row in rows:
        console.print(Text(row["text"]))


COMMANDS = {"run": run}
