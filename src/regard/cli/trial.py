"""regard trial: judge a model with and without methods on the same texts, in one table."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from regard.cli import trial_vqa
from regard.cli.common import check_output, count, load, read_text, working, write_json
from regard.cli.derive import Commands
from regard.errors import InputError
from regard.zoo.options import Loading, placed

app = Commands("Judge methods on the same texts, side by side with the plain model.")

Model = Annotated[str, typer.Option(help="A name of `regard models`, a folder or a hub id.")]
With = Annotated[
    str,
    typer.Option(
        "--with", help="Methods, settings after a colon: act,task-kv:ratio=0.4,sinks=4,act+h2o."
    ),
]
Ratio = Annotated[
    str | None,
    typer.Option(help="Share of the prompt kept, for methods that state no budget; or several."),
]
Budget = Annotated[
    int | None, typer.Option(min=1, help="The same as a number of rows, instead of --ratio.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--json",
        "--out",
        metavar="FILE|-",
        help="Write everything as JSON here, unfinished work beside; - stdout.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of what is made on the spot.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts of equal length read at once.")]
RATIO = "0.25"

app.command("vqa")(trial_vqa.vqa)


@app.command("perplexity")
def perplexity(
    model: Model = "smollm2-135m",
    with_: With = "",
    text: Annotated[str, typer.Option(help="@file or @name: a long text.")] = "@northanger-abbey",
    context: Annotated[str, typer.Option(help="Tokens that fill the cache: 1024 or 1k.")] = "1k",
    continuation: Annotated[int, typer.Option(min=1, help="Tokens scored after them.")] = 64,
    documents: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 8,
    ratio: Ratio = None,
    budget: Budget = None,
    batch_size: BatchSize = 8,
    json: Out = None,
    *,
    loading: Loading,
) -> None:
    """How well a long text is continued over the cache that each method keeps.

    An interrupted run with --json goes on where it stopped.

    [bold]Examples[/]

      regard trial perplexity --with act,task-kv:sinks=4,recent=32,snapkv,random --ratio 0.25

      regard trial perplexity --with h2o --ratio 0.25,0.5 --text @book.txt --json out.json
    """
    from regard.lab.trials import perplexity as trial

    configurations = _begin(with_, ratio, budget, json)
    content, length = read_text(text), count(context)
    loaded, tokenizer = load(model, loading)
    with working("cutting the text"):
        batches = trial.batches(
            loaded,
            tokenizer,
            content,
            context=length,
            continuation=continuation,
            documents=documents,
            batch_size=batch_size,
        )
    settings = {
        "text": text if text.startswith("@") else "given",
        "context": length,
        "continuation": continuation,
        "documents": documents,
        "batch_size": batch_size,
    }
    _judge("perplexity", trial, loaded, model, configurations, batches, settings, json, [content])


@app.command("ruler")
def ruler(
    model: Model = "smollm2-135m",
    with_: With = "",
    tasks: Annotated[str, typer.Option(help="Names of tasks, or all.")] = "all",
    length: Annotated[str, typer.Option(help="Tokens of prompt and answer: 512 or 1k.")] = "512",
    examples: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 20,
    skip_low: Annotated[
        bool, typer.Option(help="Tasks too hard for the plain model: leave the methods out.")
    ] = False,
    chat: Annotated[
        bool, typer.Option(help="Use the model's chat template, if it has one.")
    ] = True,
    ratio: Ratio = None,
    budget: Budget = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    json: Out = None,
    *,
    loading: Loading,
) -> None:
    """Find needles, follow chains, count words and answer questions in long prompts (RULER).

    Tasks on which the plain model is too weak to tell methods apart are marked and left out of the
    mean. An interrupted run with --json goes on where it stopped.

    [bold]Examples[/]

      regard trial ruler --length 512 --with task-kv:sinks=4,recent=32,snapkv,random --ratio 0.5

      regard trial ruler --tasks single-text,multi-key --length 256 --examples 40 --with act
    """
    from regard.lab.trials import ruler as trial

    configurations = _begin(with_, ratio, budget, json)
    wanted, size = trial.names(tasks), count(length)
    loaded, tokenizer = load(model, loading)
    with working("making the prompts"):
        batches = trial.batches(
            loaded,
            tokenizer,
            wanted,
            length=size,
            examples=examples,
            seed=seed,
            chat=chat,
            batch_size=batch_size,
        )
    settings = {
        "tasks": wanted,
        "length": size,
        "examples": examples,
        "seed": seed,
        "chat": chat,
        "ceiling": trial.CEILING.least,
        "batch_size": batch_size,
    }
    _judge(
        "ruler", trial, loaded, model, configurations, batches, settings, json,
        floor=trial.CEILING, skip_low=skip_low,
    )  # fmt: skip


@app.command("labels")
def labels(
    model: Model = "smollm2-135m",
    with_: With = "",
    task: Annotated[
        str, typer.Option(help='sentiment, topic, or JSON lines {"text": ..., "label": ...}.')
    ] = "sentiment",
    template: Annotated[
        str | None, typer.Option(help="The prompt of a file's texts, {text} in it.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="Head list of `regard calibrate`, for methods that take one."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Texts at most.")] = 80,
    ratio: Ratio = None,
    budget: Budget = None,
    seed: Seed = 0,
    json: Out = None,
    *,
    loading: Loading,
) -> None:
    """Whether the right label follows a text: accuracy, and margin over the best wrong label.

    An interrupted run with --json goes on where it stopped.

    [bold]Examples[/]

      regard trial labels --task topic --with act --heads heads.json

      regard trial labels --task reviews.jsonl --template "Review: {text} It is" --with act,h2o
    """
    from regard.lab.trials import label_trial as trial
    from regard.lab.trials.configurations import with_setting

    if heads is not None:
        with_ = with_setting(with_, "heads", str(heads))
    configurations = _begin(with_, ratio, budget, json)
    how, texts = trial.task(task, template=template, examples=examples, seed=seed)
    loaded, tokenizer = load(model, loading)
    batches = trial.batches(loaded, tokenizer, texts, how)
    settings = {
        "task": Path(task).name,
        "labels": list(how.labels),
        "template": how.template,
        "examples": len(texts),
        "seed": seed,
    }
    pairs = [[e.text, e.label] for e in texts]
    _judge("labels", trial, loaded, model, configurations, batches, settings, json, [pairs])


@app.command("lm-eval")
def lm_eval(
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness: arc_easy,piqa.")],
    model: Model = "smollm2-135m",
    with_: With = "",
    include: Annotated[
        Path | None, typer.Option(help="A folder of tasks of one's own, the harness's YAML.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Texts of each task at most.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Worked examples before each.")] = None,
    ratio: Ratio = None,
    budget: Budget = None,
    seed: Seed = 0,
    json: Out = None,
    *,
    loading: Loading,
) -> None:
    """EleutherAI's lm-evaluation-harness on the model with methods applied.

    Its tasks fetch their data from a hub. Methods that shorten the cache show only in tasks that
    generate.

    [bold]Example[/]

      regard trial lm-eval --tasks arc_easy --limit 100 --with act
    """
    from regard.lab.trials import lm_eval as trial

    configurations = _begin(with_, ratio, budget, json)
    names = tasks.split(",")
    trial.tasks(names, include)
    loaded, tokenizer = load(model, loading)
    settings = {
        "tasks": [n.strip() for n in names if n.strip()],
        "limit": limit,
        "shots": shots,
        "seed": seed,
    }

    def run(journal: Any) -> dict[str, Any]:
        scores = trial.run(
            loaded, tokenizer, names, configurations,
            include=include, limit=limit, shots=shots, seed=seed, journal=journal,
        )  # fmt: skip
        return {"scores": scores}

    _measured("lm-eval", trial, run, trial.table, loaded, model, settings, json)


# -- what they share -------------------------------------------------------------------------------
def _begin(with_: str, ratio: str | None, budget: int | None, json: Path | None) -> list[Any]:
    """The configurations, checked together with the place of the result."""
    from regard.lab.trials.configurations import read

    check_output(json)
    if ratio is not None and budget is not None:
        raise InputError("--ratio and --budget are mutually exclusive")
    given = ratio if ratio is not None or budget is not None else RATIO
    return read(with_, ratios=_ratios(given), budget=budget)


def _ratios(given: str | None) -> list[float]:
    try:
        return [float(x) for x in (given or "").split(",") if x.strip()]
    except ValueError:
        raise InputError(f"--ratio takes shares such as 0.25 or 0.25,0.5, not {given!r}") from None


def _judge(
    name: str,
    trial: ModuleType,
    model: Any,
    model_name: str,
    configurations: Sequence[Any],
    batches: Sequence[Any],
    settings: dict[str, Any],
    json: Path | None,
    texts: Sequence[Any] = (),
    **how: Any,
) -> None:
    """Run a trial of texts, write its result, and print the table."""
    from regard.lab.trials import frame, summary

    def run(journal: Any) -> dict[str, Any]:
        scores = frame.run(model, configurations, batches, journal=journal, label=name, **how)
        return summary.result(name, scores, configurations)

    _measured(name, trial, run, summary.table, model, model_name, settings, json, list(texts))


def _measured(
    name: str,
    trial: ModuleType,
    run: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], Any],
    model: Any,
    model_name: str,
    settings: dict[str, Any],
    json: Path | None,
    texts: Any = None,
) -> None:
    """Run a trial with a journal beside its result, write the result, and print its table."""
    import torch

    from regard.lab.bench.record import environment
    from regard.lab.fingerprint import fingerprint
    from regard.lab.journal import Journal
    from regard.lab.reproduce.harness import device
    from regard.report.screen import Console

    source = fingerprint(trial.__name__, data=texts)
    key = {"model": model_name, "settings": settings, "on": placed(model), "source": source}
    with Journal.beside(json, {"trial": name, **key}) as journal:
        result = {
            "trial": name,
            "model": _shown(model_name),
            "settings": settings,
            "command": shlex.join(["regard", *sys.argv[1:]]),
            **run(journal),
            "environment": environment(torch.get_num_threads(), str(model.device)),
            "device": device(model),
            "source": source,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "seconds": round(journal.seconds, 1),
        }
        write_json(result, json)
        journal.clear()
    if str(json) != "-":
        Console().print(table(result))


def _shown(model: str) -> str:
    """A folder is named, not where it lies: results are read on other machines."""
    return Path(model).name if Path(model).is_dir() else model
