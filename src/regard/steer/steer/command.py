"""regard run steer: synthetic text by a guided expert, away from what is there already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import err, load, read_text, working
from regard.cli.diffusion import finish
from regard.cli.pages import check_places
from regard.errors import InputError
from regard.zoo.options import Loading, placed

from .card import Settings
from .kept import KeptSamples


def run(
    settings: Settings,
    loading: Loading,
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
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Samples.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Longest sample.")] = 40,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples at once; these do not see each other.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the samples here as JSONL; goes on if interrupted."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE|-", help="All as one JSON; - for stdout.")
    ] = None,
) -> None:
    """STEER: domain text from an expert, stronger than it is, that does not repeat the examples.

    Every sample joins the pool that later negative prompts are drawn from.
    """
    from regard.lab.answers import noted
    from regard.zoo.expert import prompt as task

    from .sampling import sample

    check_places(json, out)
    if prompt is None and expert != "austen":
        raise InputError("an expert of your own needs its task: give --prompt")
    pool = _lines(negatives)
    if settings.eta and not pool:
        if negatives is not None:
            raise InputError(f"{negatives} holds no example: write one a line, or set --eta 0")
        raise InputError("--eta above 0 needs examples to stay away from: --negatives FILE")
    content = task() if prompt is None else read_text(prompt)
    record = {
        "expert": expert,
        "base": base,
        "prompt": content,
        **settings.settings(),
        "tokens": tokens,
        "batch": batch,
        "negatives": pool.copy(),
        "count": count,
    }
    kept = KeptSamples(out, record)
    pool += [row["text"] for row in kept.rows if row["text"]]
    with noted("STEER") as notes:
        model, amateur, tokenizer = _models(expert, base, settings.gamma, loading)
        samples = sample(
            model,
            tokenizer,
            content,
            pool,
            count=count,
            base=amateur,
            tokens=tokens,
            batch=batch,
            start=len(kept.rows),
            **settings.settings(),
        )
        _collect(samples, kept)
    kept.finish()
    result = {"settings": record, "loaded": placed(model), "samples": kept.rows, "notes": notes}
    texts = [row["text"] for row in kept.rows]
    lines = texts if out is None else [f"{len(texts)} samples in {out}"]
    err().print(f"expert: {expert}, {result['loaded']}", markup=False, highlight=False)
    finish(result, json, lines, notes)


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


def _models(expert: str, base: str | None, gamma: float, loading: Loading) -> tuple[Any, Any, Any]:
    """Expert, base (None: the expert's adapter switched off), tokenizer."""
    from regard.zoo.expert import BASE, load_expert

    if (Path(expert).expanduser() / "config.json").is_file():
        if base is None and gamma:
            raise InputError(f"{expert} is a whole model: give --base, what it was tuned from")
        model, tokenizer = load(expert, loading)
        amateur = load(base, loading)[0] if base and gamma else None
    else:
        with working(f"loading {expert}"):
            model, tokenizer = load_expert(expert, base or BASE, loading.load)
        amateur = None
    if tokenizer is None:
        raise InputError(f"{expert} carries no tokenizer: save it beside the weights")
    return model, amateur, tokenizer


def _collect(samples: Iterator[Any], kept: KeptSamples) -> None:
    """Sample under a progress bar."""
    from regard.progress import bar

    with bar(kept.settings["count"] - len(kept.rows), "samples") as advance:
        for one in samples:
            kept.add(one.as_dict())
            advance()


COMMANDS = {"run": run}
