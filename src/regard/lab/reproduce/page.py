"""Results for reading: the generated page, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import InputError

from .harness import VERDICTS, Claim, Interval, Result, results_folder, root, write_text

if TYPE_CHECKING:
    from rich.table import Table

_COLORS = {"reproduced": "green", "partly": "yellow", "not reproduced": "red", "needs scale": "dim"}
_HEAD = """# Reproductions

What the papers claim, measured on a small machine. The rule of every verdict is written in the code
before the run, and a claim that does not hold is printed as such. This page is generated from
`reproductions/*.json`; each was written by the command it names.

The verdicts: **reproduced**; **partly**; **not reproduced**; **needs scale**: not measured here,
with the command for a larger machine.
"""


def read(folder: str | Path | None = None) -> list[Result]:
    """The results of a folder, quick ones left out, in order of their slugs."""
    where = Path(folder) if folder is not None else results_folder()
    if not where.is_dir():
        raise InputError(f"there is no folder {where}: run `regard reproduce METHOD` first")
    found = []
    for path in sorted(where.glob("*.json")):
        if path.name.startswith(".") or path.name.endswith(".quick.json"):
            continue
        try:
            found.append(Result.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as problem:
            raise InputError(f"{path} is not a result of `regard reproduce`: {problem}") from None
    return found


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
    lines = [_HEAD]
    if results:
        lines += [f"| method | {' | '.join(VERDICTS)} |", "|---|" + "---|" * len(VERDICTS)]
        for r in results:
            numbers = " | ".join(str(r.counts[v]) for v in VERDICTS)
            lines.append(f"| [{_cell(r.slug)}](#{r.slug}) | {numbers} |")
        lines.append("")
    for result in results:
        lines += _section(result)
    return "\n".join(lines).rstrip() + "\n"


def _section(result: Result) -> list[str]:
    made = ", ".join(f"{n} {v}" for n, v in result.versions.items())
    seeds = ", ".join(f"{n} {v}" for n, v in result.seeds.items())
    lines = [
        f"## {result.slug}",
        "",
        f"{result.title}: {result.paper}",
        "",
        f"{_model(result)}{result.data} Seeds: {seeds}.",
        "",
        "| claim | paper | here | control | interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim in result.claims:
        if claim.verdict == "needs scale":
            continue
        cells = [claim.statement, claim.paper, claim.here, claim.control]
        cells += [interval_text(claim.interval), f"**{claim.verdict}**"]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", "Rules, fixed before the run:", ""]
    measured = [c for c in result.claims if c.verdict != "needs scale"]
    for claim in measured:
        lines.append(f"- {claim.statement}: {claim.rule}.")
    notes = [c for c in measured if c.note]
    if notes:
        lines += ["", "Notes:", ""] + [f"- {c.statement}: {c.note}" for c in notes]
    large = [c for c in result.claims if c.verdict == "needs scale"]
    if large:
        lines += ["", "Needs scale, not measured here:", ""]
        lines += ["| claim | paper | why | command |", "|---|---|---|---|"]
        for c in large:
            command = f"`{c.command}`" + ("" if c.built else " (not built yet)")
            lines.append(
                "| " + " | ".join(map(_cell, (c.statement, c.paper, c.rule, command))) + " |"
            )
    if result.picture is not None:
        lines += ["", f"![{_cell(result.picture)}](../reproductions/{result.slug}.png)"]
        lines += ["", result.picture]
    lines += [
        "",
        f"`{result.command}`, {result.date}, {result.seconds:.0f} s on {result.device}; {made}; "
        f"commit {result.commit or 'unknown'}, source {result.source}"
        + (f", weights {result.weights}." if result.weights else "."),
        "",
    ]
    return lines


def _model(result: Result) -> str:
    """Which model was measured; a method may say that itself, with its data."""
    return "" if result.model == "none" else f"Model {_cell(result.model)}. "


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


def _cell(text: Any) -> str:
    """Text that stays within its cell, and is not taken for markup."""
    flat = " ".join(str(text).split())
    return flat.replace("|", "\\|").replace("<", "&lt;")


def table(result: Result) -> Table:
    """The claims of a result for `rich` to print."""
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(f"{result.slug} on {result.model}"),
        title_justify="left",
        show_lines=True,
        show_header=False,
    )
    made.add_column(width=max(map(len, VERDICTS)))
    made.add_column(overflow="fold")
    for claim in result.claims:
        said = Text(claim.statement, "bold")
        for name, words in _facts(claim).items():
            said.append(f"\n{name}: ", "not bold dim").append(words, "not bold")
        made.add_row(Text(claim.verdict, _COLORS[claim.verdict]), said)
    if result.quick:
        made.caption = "a quick run: too small for its verdicts to mean much"
    return made


def _facts(claim: Claim) -> dict[str, str]:
    """What a reader weighs, by name."""
    if claim.verdict == "needs scale":
        command = f"{claim.command}{'' if claim.built else ' (not built yet)'}"
        return {"paper": claim.paper, "measure it with": command}
    facts = {"paper": claim.paper, "here": claim.here, "control": claim.control}
    facts["interval"] = interval_text(claim.interval)
    return {name: words for name, words in facts.items() if words and words != "-"}
