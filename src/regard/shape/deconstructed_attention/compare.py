"""Runs side by side: a table, curves, and what their maps look like."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from regard.errors import InputError
from regard.report.chart import Chart, Line, Panel
from regard.report.document import Items, Page, Section
from regard.report.look import SERIES
from regard.report.table import Table, right

MOST = len(SERIES["light"])  # lines that a chart can tell apart

COLUMNS: dict[str, tuple[str, str]] = {
    "loss": ("loss", "{:.3f}"),
    "recall": ("recall", "{:.1%}"),
    "skip_loss": ("loss without simple layers", "{:.3f}"),
    "sink_1": ("Sink 1, %", "{:.1f}"),
    "sink_2": ("Sink 2, %", "{:.1f}"),
    "star": ("Sink of the learned key, %", "{:.1f}"),
    "alpha_1": ("mean weight of the first token", "{:.3f}"),
    "entropy": ("entropy", "{:.2f}"),
    "concentration": ("concentration", "{:.2f}"),
    "diversity": ("head diversity", "{:.4f}"),
    "max_logit": ("largest logit", "{:.1f}"),
    "focus_0": ("local focus 0", "{:.3f}"),
    "focus_1": ("local focus 1", "{:.3f}"),
}


def read(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of the runs in these folders, each with its curve.

    Raises:
        InputError: a folder that holds no finished run.
    """
    runs: dict[str, dict[str, Any]] = {}
    for folder in folders:
        queue = folder / "queue.json"
        inside = [folder] if (folder / "run.json").is_file() else sorted(folder.glob("*/"))
        inside = [f for f in inside if (f / "run.json").is_file()]
        if not inside:
            what = "only unfinished runs" if queue.is_file() else "no run of `regard train lm`"
            raise InputError(f"{folder} holds {what}: name the folder given to --out")
        for place in inside:
            record = json.loads((place / "run.json").read_text(encoding="utf-8"))
            runs[str(place.resolve())] = record
    return list(runs.values())


def arms(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant, in order of first appearance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["arm"], []).append(run)
    return found


def table(by_arm: dict[str, Any]) -> Table:
    """One row a variant, of what `numbers` gave: means, with the interval over seeds where there
    are several.
    """
    shown = [n for n in COLUMNS if any(n in values for values in by_arm.values())]
    rows = []
    for arm, values in by_arm.items():
        row: list[Any] = [arm, values["seeds"]]
        for name in shown:
            row.append(_cell(values.get(name), COLUMNS[name][1], values["seeds"]))
        rows.append(row)
    return Table(["variant", right("seeds"), *(right(COLUMNS[n][0]) for n in shown)], rows)


def _cell(value: dict[str, Any] | None, form: str, seeds: int) -> str:
    if value is None:
        return "-"
    middle = form.format(value["mean"])
    if seeds < 2:
        return middle
    return f"{middle} ({form.format(value['low'])} to {form.format(value['high'])})"


def page(runs: Sequence[dict[str, Any]], by_numbers: dict[str, Any]) -> Page:
    """The comparison as one page: the runs, and what `numbers` gave of them."""
    by_arm = arms(runs)
    drawn = dict(list(by_arm.items())[:MOST])
    panels = []
    for name, words in (
        ("loss", "validation loss"),
        ("recall", "recall, share right"),
        ("sink_1", "Sink 1, % of heads"),
        ("alpha_1", "mean weight of the first token"),
        ("star", "Sink of the learned key, %"),
    ):
        lines = [line for arm, own in drawn.items() if (line := _line(arm, own, name))]
        if lines:
            panels.append(Panel("step", words, lines))
    context = [
        Line(arm, _context(own))
        for arm, own in drawn.items()
        if all("by_context" in r["final"] for r in own)
    ]
    if context:
        panels.append(Panel("quarter of the block", "loss by context", context))
    settings = [r["settings"] for r in runs if r.get("settings")]
    varied = sorted(
        {n for s in settings for n in s if any(x.get(n) != s[n] for x in settings)} - {"device"}
    )
    notes = [
        "Means over seeds; in brackets the 95 % interval, bootstrapped over seeds: of three it is "
        "rough.",
        "Sinks are measured on sequences of 64 tokens at a threshold of 0.3; rates of mixers whose "
        "weights are no distribution are of normalised weights, not comparable with softmax.",
    ]
    if len(drawn) < len(by_arm):
        notes.append(
            f"Curves show the first {MOST} of {len(by_arm)} variants: name fewer to see others."
        )
    if varied:
        notes.append("The runs differ in more than their mixers: " + ", ".join(varied) + ".")
    sections = [
        Section("Results", [table(by_numbers)], name="Results"),
        Section(
            "Curves",
            [Chart(panels, "measurements during training, by variant", columns=2)],
            lead="Every line is the mean over the seeds of a variant.",
            name="Curves",
        ),
        Section("How to read it", [Items(notes)], name="Notes"),
    ]
    return Page("Language models by token mixer", sections, [], source="`regard compare`")


def _line(arm: str, own: Sequence[dict[str, Any]], name: str) -> Line | None:
    by_step: dict[int, list[float]] = {}
    for run in own:
        for point in run["curve"]:
            if point.get(name) is not None:
                by_step.setdefault(point["step"], []).append(point[name])
    whole = {step: v for step, v in by_step.items() if len(v) == len(own)}
    if not whole:
        return None
    return Line(arm, [(step, fmean(values)) for step, values in sorted(whole.items())], corners=0)


def _context(own: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    parts = [r["final"]["by_context"] for r in own]
    return [(n + 1.0, fmean([p[n] for p in parts])) for n in range(len(parts[0]))]
