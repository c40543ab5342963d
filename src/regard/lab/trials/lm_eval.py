"""EleutherAI's lm-evaluation-harness on a model with methods applied.

Software: "A framework for few-shot language model evaluation", Gao et al., github.com/EleutherAI/
lm-evaluation-harness; the package `lm-eval`, in the extra `regard[lm-eval]`. Its tasks fetch their
data from a hub.

Deviations from a plain run of the harness: texts are read one at a time. It pads rows of a batch
without saying so to the model, and what methods see would change with their neighbours.

Methods that shorten the cache act on tokens that follow the prompt. Tasks whose choices are scored
in one pass over the whole text (`output_type: multiple_choice` or `loglikelihood`) therefore give
the numbers of the plain model under them; tasks that generate show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.errors import InputError, nearest
from regard.lab.journal import Journal
from regard.parts.labels import check_model
from regard.report.table import Table, right

from .configurations import FULL, Configuration

EXTRA = (
    "regard trial lm-eval needs the package lm-eval, which is part of an extra: "
    "pip install 'regard[lm-eval]'"
)


def available() -> None:
    """InputError where the package is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError(EXTRA) from None


def tasks(names: Sequence[str], include: str | Path | None = None) -> tuple[Any, list[str]]:
    """The harness's task manager and the tasks, groups spelled out by it later.

    Args:
        include: a folder of one's own tasks, as YAML files of the harness.

    Raises:
        InputError: no package, no such folder, an unknown task, or none.
    """
    available()
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise InputError(f"there is no folder {include}: give one with the harness's YAML files")
    manager = TaskManager(include_path=None if include is None else str(include))
    requested = list(dict.fromkeys(n.strip() for n in names if n.strip()))
    if not requested:
        raise InputError("name at least one task of the harness, for example --tasks arc_easy")
    for name in requested:
        if name not in manager.all_tasks:
            raise InputError(f"the harness has no task {name!r}.{nearest(name, manager.all_tasks)}")
    return manager, requested


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    configurations: Sequence[Configuration],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """The harness's own numbers for every configuration, the plain model first.

    Args:
        limit: texts of each task at most.
        shots: worked examples before each text; the task's own number when None.

    Returns:
        configuration key -> task -> metric -> value, and the standard errors as the harness names
        them.

    Raises:
        InputError: no package, an unknown task, a task whose data cannot be had, a method that
            needs to know the length of a prompt beforehand.
    """
    manager, requested = tasks(names, include)
    check_model(model, tokenizer)
    check(model, configurations)
    journal = journal if journal is not None else Journal(None, {})
    results = {}
    for configuration in configurations:
        key, source = configuration.key, configuration.source
        known = journal.parts.get(key)
        if known is None or known["source"] != source:
            scores = _evaluate(
                model, tokenizer, manager, requested, configuration, limit, shots, seed
            )
            journal.put(key, {"source": source, "scores": scores})
        results[key] = journal.parts[key]["scores"]
    return results


def check(model: Any, configurations: Sequence[Configuration]) -> None:
    """InputError for a method whose budget depends on the length of the prompt, or that this model
    cannot take.
    """
    from regard.watching import apply

    for configuration in configurations:
        for part in configuration.parts:
            free = part.takes_budget() and configuration.ratio is not None
            if free and not hasattr(part.make(100, configuration.ratio, None), "ratio"):
                raise InputError(
                    f"{part.method} has a budget in rows, and the harness's prompts have many "
                    f"lengths: write {part.method}:budget=256, for example"
                )
        apply(model, *configuration.handlers(1))


def _evaluate(
    model: Any,
    tokenizer: Any,
    manager: Any,
    names: list[str],
    configuration: Configuration,
    limit: int | None,
    shots: int | None,
    seed: int,
) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from regard.watching import apply

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with apply(model, *configuration.handlers(1)):
        try:
            done = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
            )
        except (ConnectionError, OSError) as problem:
            if configuration.name != FULL:
                raise
            raise InputError(
                f"the data of {', '.join(names)} cannot be had ({type(problem).__name__}): the "
                "harness fetches it from a hub, so connect, or unset HF_HUB_OFFLINE"
            ) from None
    return {
        task: {name: float(x) for name, x in metrics.items() if isinstance(x, (int, float))}
        for task, metrics in done["results"].items()
    }


def table(result: dict[str, Any]) -> Table:
    """A row for each task and metric."""
    keys, rows = list(result["scores"]), []
    for task, metrics in result["scores"][FULL].items():
        for metric, base in metrics.items():
            name = metric.split(",")[0]
            if name.endswith("_stderr") or name == "sample_len":
                continue
            cells = []
            for key in keys:
                value = result["scores"][key].get(task, {}).get(metric)
                error = metrics.get(metric.replace(name, f"{name}_stderr", 1))
                text = "-" if value is None else f"{value:.3f}"
                if key == FULL and error is not None:
                    text += f" ± {error:.3f}"
                elif value is not None and key != FULL:
                    text += f" ({value - base:+.3f})"
                cells.append(text)
            rows.append([task, name, *cells])
    columns = ["task", "metric", *map(right, keys)]
    return Table(columns, rows, f"lm-eval on {result['model']}", keys=2)
