"""From single scores to one table: means, differences to the plain model, intervals; as JSON and
for a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regard.lab.intervals import bootstrap, mean, paired
from regard.report.document import Page, Section
from regard.report.table import Cell, Column, Table, right

from .configurations import FULL, Configuration
from .frame import Scores, Values

ALL = "all"
BAR = 6  # letters of the longest bar


@dataclass(frozen=True)
class Score:
    """A number that a trial gives every text.

    Attributes:
        key: its name in the results.
        title: what it is called in a table.
        better: "high" or "low".
        exponential: shown as exp of the mean, as perplexity is of nats.
    """

    key: str
    title: str
    better: str
    exponential: bool = False


SCORES: dict[str, tuple[Score, ...]] = {
    "perplexity": (Score("nll", "perplexity", "low", exponential=True),),
    "ruler": (Score("recall", "recall", "high"),),
    "labels": (Score("correct", "accuracy", "high"), Score("margin", "margin, nats", "high")),
}
"""The scores of every trial; the first is the one that a table is about."""


def result(trial: str, scores: Scores, configurations: Sequence[Configuration]) -> dict[str, Any]:
    """What a run measured, as plain JSON values: the table (`rows`) and every score (`texts`)."""
    return {
        "scores": [asdict(s) for s in SCORES[trial]],
        "rows": rows(trial, scores, configurations),
        "low": scores.low,
        "skipped": scores.skipped,
        "refused": scores.refused,
        "notes": {key: notes for key, notes in scores.notes.items() if notes},
        "texts": {
            key: {
                task: {str(n): v for n, v in sorted(texts.items())} for task, texts in tasks.items()
            }
            for key, tasks in scores.values.items()
        },
    }


def rows(
    trial: str, scores: Scores, configurations: Sequence[Configuration]
) -> list[dict[str, Any]]:
    """One row for each configuration and task, and one over all tasks where there are several.

    The last leaves out tasks that are too hard for the plain model. Intervals are 95 % bootstrap
    intervals over texts; a difference to the plain model is that of the same texts.
    """
    tasks = list(scores.values.get(FULL, {}))
    fair = [t for t in tasks if t not in scores.low]
    table_rows = []
    for configuration in configurations:
        values = scores.values.get(configuration.key, {})
        for task in tasks:
            if task in values:
                table_rows.append(_row(trial, scores, configuration, task, [task]))
        if len(tasks) > 1 and fair and all(t in values for t in fair):
            table_rows.append(_row(trial, scores, configuration, ALL, fair))
    return table_rows


def _row(
    trial: str, scores: Scores, configuration: Configuration, name: str, tasks: list[str]
) -> dict[str, Any]:
    changed, plain = scores.values[configuration.key], scores.values[FULL]
    pairs = [(changed[t][n], plain[t][n]) for t in tasks for n in sorted(changed[t])]
    row: dict[str, Any] = {
        "configuration": configuration.key,
        "name": configuration.name,
        "ratio": configuration.ratio,
        "task": name,
        "tasks": len(tasks),
        "texts": len(pairs),
    }
    for score in SCORES[trial]:
        row[score.key] = _measured(score, pairs)
        if configuration.name != FULL:
            apart = paired(*([side[score.key] for side in sides] for sides in zip(*pairs)))
            difference = {"mean": apart.mean, "low": apart.low, "high": apart.high}
            row[score.key]["difference"] = difference
    row["held"] = sum(a["held"] for a, _ in pairs) / max(sum(b["held"] for _, b in pairs), 1)
    read = [a["read"] / b["read"] for a, b in pairs if a["read"] and b["read"]]
    row["read"] = mean(read) if read else None
    return row


def _measured(score: Score, pairs: list[tuple[Values, Values]]) -> dict[str, Any]:
    values = _spread([a[score.key] for a, _ in pairs])
    if not score.exponential:
        return values
    return {**values, "exp": {name: math.exp(x) for name, x in values.items()}}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, high = bootstrap(values)
    return {"mean": mean(values), "low": low, "high": high}


# -- tables ----------------------------------------------------------------------------------------
def table(result: dict[str, Any]) -> Page:
    """The result for a terminal."""
    scores = [Score(**s) for s in result["scores"]]
    tasks = list(dict.fromkeys(r["task"] for r in result["rows"]))
    sections = []
    for task in tasks:
        rows = [r for r in result["rows"] if r["task"] == task]
        title = heading(result, task) if len(tasks) > 1 else "all texts"
        sections.append(Section(title, [grid(scores, rows, task in result["low"], bars=True)]))
    sections.append(Section("Notes", remarks(result)))
    return Page(f"{result['trial']} on {result['model']}", sections)


def grid(
    scores: Sequence[Score], rows: Sequence[dict[str, Any]], weak: bool = False, bars: bool = False
) -> Table:
    """A row for each configuration: a bar or the interval beside each score, and the difference to
    the plain model. `weak` rows, of a task too hard for the model, have no colours.
    """
    columns: list[Column | str] = ["configuration"]
    for score in scores:
        unit = " (nats)" if score.exponential else ""
        beside = Column("") if bars else right("95 %")
        columns += [right(score.title), beside, right(f"difference to full{unit}")]
    cells = []
    for row in rows:
        line = [Cell(row["configuration"])]
        for score in scores:
            mean, change = shown_mean(score, row), row[score.key].get("difference")
            most = max(abs(shown_mean(score, r)) for r in rows) or 1
            bar = Cell("█" * round(BAR * abs(mean) / most), "" if weak else "cyan")
            style = ""
            if change is not None and not weak and (change["low"] > 0 or change["high"] < 0):
                style = "green" if (change["mean"] > 0) == (score.better == "high") else "red"
            line += [
                Cell(number(score, mean)),
                bar if bars else Cell(interval(score, row)),
                Cell(difference(score, row), style),
            ]
        cells.append([*line, percent(row["held"]), percent(row["read"])])
    return Table([*columns, right("held"), right("read")], cells, keys=1)


def heading(result: dict[str, Any], task: str) -> str:
    """What a part of the table is about."""
    if task != ALL:
        return f"{task}{' (too hard for the model)' if task in result['low'] else ''}"
    count = next(r["tasks"] for r in result["rows"] if r["task"] == ALL)
    return f"all {count} tasks together" if not result["low"] else (
        f"the {count} tasks together that the model can do"
    )  # fmt: skip


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the numbers should know, a line each."""
    first = Score(**result["scores"][0])
    lines = [
        "Intervals are 95 % bootstrap intervals over texts; held: bytes of keys and values after "
        "the prompt; read: keys that a query head reads for a new token; both as shares of full."
    ]
    if result["low"]:
        least = result["settings"].get("ceiling")
        lines.append(
            f"Below {least:g} {first.title} of the full model, too low to tell methods apart: "
            f"{', '.join(result['low'])}"
            + (" (not measured for the others)." if result["skipped"] else ".")
            + " The tasks that are left were chosen by the full model's own score on these texts, "
            "which flatters it a little."
        )
    for key, tasks in result["refused"].items():
        lines += [f"{key} refused {task}: {reason}" for task, reason in tasks.items()]
    for key, notes in result["notes"].items():
        lines += [f"{key}: {note}" for note in notes]
    return lines


def shown_mean(score: Score, row: dict[str, Any]) -> float:
    """The mean as it is shown."""
    stats = row[score.key]
    return float(stats["exp"]["mean"] if score.exponential else stats["mean"])


def percent(share: float | None) -> str:
    """
    >>> percent(0.256), percent(None)
    ('26 %', '-')
    """
    return "-" if share is None else f"{100 * share:.0f} %"


def number(score: Score, x: float) -> str:
    """
    >>> number(SCORES["ruler"][0], 0.5), number(SCORES["perplexity"][0], 12.345)
    ('0.50', '12.35')
    """
    return f"{x:.2f}"


def interval(score: Score, row: dict[str, Any]) -> str:
    """The interval of the mean, as it is shown."""
    stats = row[score.key]["exp"] if score.exponential else row[score.key]
    return f"{number(score, stats['low'])} to {number(score, stats['high'])}"


def difference(score: Score, row: dict[str, Any]) -> str:
    """The difference to the plain model with its interval, empty for the plain model itself."""
    change = row[score.key].get("difference")
    if change is None:
        return ""
    digits = 3 if score.exponential else 2
    return (
        f"{_signed(change['mean'], digits)} ({_signed(change['low'], digits)} to "
        f"{_signed(change['high'], digits)})"
    )


def _signed(x: float, digits: int) -> str:
    """
    >>> _signed(0.1234, 2), _signed(-0.0001, 2), _signed(0.0, 2)
    ('+0.12', '0.00', '0.00')
    """
    text = f"{x:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"
