"""regard calibrate act, and regard bench act."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.bench_costs import Model, Out, Page, Rounds, measure
from regard.cli.common import check_file, count, load, numbers
from regard.errors import InputError
from regard.zoo.options import Loading


def calibrate(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the head list here.")],
    task: Annotated[
        str, typer.Option(help="A built-in task, or several to pool; names the prompt for --data.")
    ] = "sentiment",
    data: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"text": ..., "label": ...}; made sentences when left out.'),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="The prompt, {text} in it, ending where the label begins.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id.")
    ] = "smollm2-135m",
    samples: Annotated[int, typer.Option(min=2, help="Examples of each task at most.")] = 60,
    by: Annotated[str, typer.Option(help="What a head must raise: margin or accuracy.")] = "margin",
    least: Annotated[float, typer.Option(help="Keep heads that raise it by more.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep so many heads at most.")] = None,
    beta: Annotated[float, typer.Option(help="Share of its attention a sink keeps.")] = 0.4,
    alpha: Annotated[float, typer.Option(help="A sink receives over alpha / N.")] = 5.0,
    threshold: Annotated[
        float | None, typer.Option(help="A sink receives over this, instead of alpha / N.")
    ] = None,
    skip_layers: Annotated[
        str, typer.Option(help="How many first and last layers are left alone.")
    ] = "2,1",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run at once.")] = 16,
) -> None:
    """Try every head alone on labelled prompts, and write those that help.

    An interrupted run goes on where it stopped. The list is for this model and this kind of task.

    [bold]Examples[/]

      regard calibrate act --task sentiment --data train.jsonl --out heads.json

      regard calibrate act --task sentiment,topic --top-k 50 --out heads.json
    """
    from regard.report.screen import Console
    from regard.steer.act.heads import HeadFilter

    check_file(out)
    if not math.isfinite(least):
        raise InputError(f"--least is a finite number, not {least}: write, say, 0.01")
    skipped = numbers(skip_layers, "skip-layers") or []
    if len(skipped) != 2:
        raise InputError(f"--skip-layers takes two numbers such as 2,1, not {skip_layers!r}")
    prompts, truth, choices = _prompts(task, data, template, samples)
    loaded, tokenizer = load(model)
    found = HeadFilter(
        loaded,
        tokenizer,
        beta=beta,
        alpha=alpha,
        threshold=threshold,
        skip_layers=(skipped[0], skipped[1]),
        by=by,
        least=least,
        top_k=top_k,
        batch_size=batch_size,
        records=out.with_name(f"{out.name}.records.jsonl"),
        progress=True,
    )
    found.fit(prompts, truth, choices)
    found.save(out)
    count = sum(map(len, found.heads_.values()))
    base = found.baseline_
    Console().print(
        f"{count} of {len(found.scores_)} heads kept by {by}, in {out}. The untouched model: "
        f"accuracy {base['accuracy']:.2f}, margin {base['margin']:+.3f} on {len(prompts)} prompts.",
        markup=False,
        highlight=False,
    )


def _prompts(
    task: str, data: Path | None, template: str | None, samples: int
) -> tuple[list[str], list[str], list[Any]]:
    """Prompts, right labels and choices of every prompt."""
    from regard.lab.trials.labels import TASKS, Task, fill, read_examples, sentences

    names = [n.strip() for n in task.split(",") if n.strip()]
    if data is not None:
        examples = read_examples(data)[:samples]
        own = tuple(sorted({e.label for e in examples}))
        known = TASKS.get(names[0]) if len(names) == 1 else None
        if template is None and (known is None or not set(own) <= set(known.labels)):
            raise InputError(
                f"the labels {list(own)} are not those of a built-in task {task!r}: give the "
                "prompt with --template"
            )
        labels = known.labels if known is not None and template is None else own
        sets = [(Task(labels, template or (known.template if known else "")), examples)]
    elif template is not None:
        raise InputError("--template goes with --data: the built-in tasks bring their own")
    else:
        made = [(n, sentences(n, samples)) for n in names]  # refuses a task that there is not
        sets = [(TASKS[n], examples) for n, examples in made]
    prompts, truth, choices = [], [], []
    for how, examples in sets:
        prompts += [fill(how.template, e.text) for e in examples]
        truth += [e.label for e in examples]
        choices += [how.labels] * len(examples)
    return prompts, truth, choices


def bench(
    model: Model = "smollm2-135m",
    tokens: Annotated[str, typer.Option(help="Length of the prompt: 4096 or 4k.")] = "4k",
    rounds: Rounds = 5,
    out: Out = None,
    page: Page = None,
    *,
    loading: Loading,
) -> None:
    """What ACT costs: a prefill with a fifth of the heads and with all, and one long head.

    [bold]Example[/]

      regard bench act --out act.json
    """
    from . import cost

    measure(cost, out, page, model, loading, tokens=count(tokens), rounds=rounds)


COMMANDS = {"calibrate": calibrate, "bench": bench}
