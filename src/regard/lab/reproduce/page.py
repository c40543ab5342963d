"""Results for reading: the generated page, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from regard.errors import InputError
from regard.report.document import Block, Items, Page, Section
from regard.report.table import Cell, Table

from .harness import VERDICTS, Interval, Result, results_folder, root, write_text

_COLORS = {"reproduced": "green", "partly": "yellow", "not reproduced": "red", "needs scale": "dim"}
_INTRODUCTION = (
    "What the papers claim, measured on a small machine. The rule of every verdict is written in "
    "the code before the run, and a claim that does not hold is printed as such. This page is "
    "generated from `reproductions/*.json`; each was written by the command it names.",
    "The verdicts: **reproduced**; **partly**; **not reproduced**; **needs scale**: not measured "
    "here, with the command for a larger machine.",
)


def read(folder: str | Path | None = None) -> list[Result]:
    """The results of a folder, quick ones left out, in order of their slugs."""
    where = Path(folder) if folder is not None else results_folder()
    if not where.is_dir():
        raise InputError(f"there is no folder {where}: run `regard reproduce METHOD` first")
    results = []
    for path in sorted(where.glob("*.json")):
        if path.name.startswith(".") or path.name.endswith(".quick.json"):
            continue
        try:
            results.append(Result.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as problem:
            raise InputError(f"{path} is not a result of `regard reproduce`: {problem}") from None
    return results


def page(folder: str | Path | None = None, target: str | Path | None = None) -> Path:
    """Write the page of all results, `docs/reproductions.md` by default; returns its path."""
    where = Path(target) if target is not None else (root() or Path.cwd()) / "docs/reproductions.md"
    if not where.parent.is_dir():
        raise InputError(f"there is no folder {where.parent}: make it, or name another target")
    write_text(where, page_text(read(folder)))
    return where


def page_text(results: Iterable[Result]) -> str:
    """The page as Markdown; the same results give the same text."""
    results = sorted(results, key=lambda r: r.slug)
    rows = [[Cell(r.slug, url=f"#{r.slug}"), *(r.counts[v] for v in VERDICTS)] for r in results]
    counts = [Table(["method", *VERDICTS], rows)] if results else []
    sections = [_section(result) for result in results]
    return Page("Reproductions", sections, [*_INTRODUCTION, *counts]).markdown()


def _section(result: Result) -> Section:
    versions = ", ".join(f"{n} {v}" for n, v in result.versions.items())
    seeds = ", ".join(f"{n} {v}" for n, v in result.seeds.items())
    measured = [c for c in result.claims if c.verdict != "needs scale"]
    rows = [
        [
            *(c.statement, c.paper, c.here, c.control),
            interval_text(c.interval),
            Cell(c.verdict, "bold"),
        ]
        for c in measured
    ]
    blocks: list[Block] = [
        f"{result.title}: {result.paper}",
        f"{_model(result)}{result.data} Seeds: {seeds}.",
        Table(["claim", "paper", "here", "control", "interval", "verdict"], rows),
        "Rules, fixed before the run:",
        Items([f"{c.statement}: {c.rule}." for c in measured]),
    ]
    if notes := [f"{c.statement}: {c.note}" for c in measured if c.note]:
        blocks += ["Notes:", Items(notes)]
    large = [
        [c.statement, c.paper, c.rule, f"`{c.command}`" + ("" if c.built else " (not built yet)")]
        for c in result.claims
        if c.verdict == "needs scale"
    ]
    if large:
        table = Table(["claim", "paper", "why", "command"], large)
        blocks += ["Needs scale, not measured here:", table]
    if result.picture is not None:
        file = f"../reproductions/{result.slug}.png"
        blocks += [f"![{' '.join(result.picture.split())}]({file})", result.picture]
    blocks.append(
        f"`{result.command}`, {result.date}, {result.seconds:.0f} s on {result.device}; "
        f"{versions}; commit {result.commit or 'unknown'}, source {result.source}"
        + (f", weights {result.weights}." if result.weights else ".")
    )
    return Section(result.slug, blocks)


def _model(result: Result) -> str:
    """Which model was measured; a method may say that itself, with its data."""
    return "" if result.model == "none" else f"Model {result.model}. "


def interval_text(interval: Interval | None) -> str:
    """An interval in words.

    >>> interval_text(Interval("bootstrap over texts", 1.0, 2.5, 0.01))
    '1 to 2.5 (bootstrap over texts), p = 0.01'
    """
    if interval is None:
        return "-"
    parts = []
    if interval.low is not None and interval.high is not None:
        parts.append(f"{interval.low:.4g} to {interval.high:.4g} ({interval.kind})")
    if interval.p is not None:
        parts.append(f"p = {interval.p:.2g}" + ("" if parts else f" ({interval.kind})"))
    return ", ".join(parts) or interval.kind


def table(result: Result) -> Table:
    """The claims of a result for a terminal."""
    rows = []
    for claim in result.claims:
        facts = [claim.paper, claim.here, claim.control, interval_text(claim.interval), ""]
        if claim.verdict == "needs scale":
            command = f"{claim.command}{'' if claim.built else ' (not built yet)'}"
            facts = [claim.paper, "", "", "", command]
        verdict = Cell(claim.verdict, _COLORS[claim.verdict])
        rows.append([claim.statement, verdict, *("" if f == "-" else f for f in facts)])
    names = ["claim", "verdict", "paper", "here", "control", "interval", "measure it with"]
    note = "a quick run: too small for its verdicts to mean much" if result.quick else ""
    return Table(names, rows, f"{result.slug} on {result.model}", note)
