"""Saved results of trials as one page of the documentation, in Markdown.

`python -m regard.lab.trials.page docs/trials.md benchmarks/results/quality-*.json`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.files import write_text
from regard.report.document import Block, Code, Items, Page, Section
from regard.report.table import Table, right

from .summary import Score, grid, heading, interval, number, remarks, shown_mean

TITLES = {
    "perplexity": "Perplexity of a continuation",
    "ruler": "RULER tasks",
    "labels": "Label scoring",
}
INTRODUCTION = (
    "What methods that shrink the key-value cache cost in quality, against each other at the same "
    "budget and against the full cache. Every configuration reads the same texts; differences to "
    "the full cache are those of the same text, with 95 % bootstrap intervals over texts. Methods "
    "that evict cut the prompt's cache once it was read, and keep every later token. Every scored "
    "token is predicted over the cache as the method keeps it.",
    "*Held* is the bytes of keys and values after the prompt, counted from storage; *read* the "
    "keys that a query head reads for a new token, counted at the attention call; both as shares "
    "of the full cache. A method that reads few keys is not a smaller cache: it holds all keys and "
    "values, copies some, and reads few of them in most steps. At an equal number of kept rows it "
    "reads about as much as the other methods and holds more than the full cache: it saves time, "
    "not memory.",
    "Intervals show the spread over these texts on one model. They say nothing of other models.",
)


def load(path: str | Path) -> dict[str, Any]:
    """A saved result; InputError for a file that is none."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        if result["trial"] not in TITLES or not result["rows"]:
            raise KeyError("trial")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(
            f"{path} is no result of a trial ({type(problem).__name__}): make one with "
            "`regard trial ... --json FILE`"
        ) from None
    return dict(result)


def page(paths: Sequence[str | Path]) -> str:
    """The page of some results, in the order given."""
    sections = [section(load(path)) for path in paths]
    source = "saved results by `python -m regard.lab.trials.page`"
    return Page("Quality at equal budget", sections, INTRODUCTION, source=source).markdown()


def section(result: dict[str, Any]) -> Section:
    """One result."""
    scores = [Score(**s) for s in result["scores"]]
    given = ", ".join(f"{k.replace('_', ' ')} {_worded(v)}" for k, v in result["settings"].items())
    blocks: list[Block] = [f"{result['model']}; {given}."]
    tasks = list(dict.fromkeys(r["task"] for r in result["rows"]))
    if len(tasks) > 1:
        blocks.append(_ceilings(result, scores[0]))
    for task in sorted(tasks, key=lambda t: t != "all"):
        rows = [r for r in result["rows"] if r["task"] == task]
        if len(rows) == 1 and len(tasks) > 1:
            continue  # nothing to compare the ceiling with
        table = grid(scores, rows)
        title = heading(result, task).capitalize()
        blocks.append(Section(title, [table]) if len(tasks) > 1 else table)
    if lines := remarks(result)[1:]:
        blocks.append(Items(lines))
    machine = result["environment"]
    blocks += [
        Code(result["command"]),
        f"{result['date']}, {result['seconds'] / 60:.0f} minutes on {machine['threads']} thread"
        f"{'' if machine['threads'] == 1 else 's'} of {machine['cpu']}; torch "
        f"{machine['torch']}, transformers {machine['transformers']}.",
    ]
    return Section(TITLES[result["trial"]], blocks)


def _ceilings(result: dict[str, Any], score: Score) -> Table:
    """What the full model reaches on every task, and where that is too little."""
    rows = [
        [
            row["task"],
            number(score, shown_mean(score, row)),
            interval(score, row),
            "too low to tell" if row["task"] in result["low"] else "",
        ]
        for row in result["rows"]
        if row["configuration"] == "full" and row["task"] != "all"
    ]
    columns = ["task", right(f"{score.title} of the full model"), right("95 %"), ""]
    return Table(columns, rows)


def _worded(value: Any) -> str:
    """
    >>> _worded([0.25, 0.5]), _worded(True), _worded(8)
    ('0.25, 0.5', 'yes', '8')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    import sys

    write_text(Path(sys.argv[1]), page(sys.argv[2:]))
