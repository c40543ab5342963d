"""A result of bench parallel as a terminal table, a Markdown page and an HTML page with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regard.report.chart import Bar, bars
from regard.report.document import Code, Html, Items, Page, Section
from regard.report.table import Table, right

from .record import Result, load

HEAD = (
    "scheme",
    "grid",
    "forward",
    "backward",
    "sent forward",
    "sent backward",
    "as formula",
    "work",
    "in order",
    "padding",
    "error out",
    "error gradients",
)
BRIEF = ("scheme", "grid", "forward ms", "backward ms", "sent", "formula", "work", "error")


def rows(result: Result) -> list[dict[str, str]]:
    """One row a scheme, as text, by the names of `HEAD` and `BRIEF`."""
    lines = []
    first = next((c.values for c in result.cells.values() if c.ok), {})
    for name, cell in result.cells.items():
        line = {"scheme": name, "grid": "" if cell.ok else cell.outcome}
        lines.append(line)
        if not cell.ok:
            continue
        s, v = cell.settings, cell.values
        if "ring" in s:
            line["grid"] = grid_name(s["ulysses"], s["ring"], s["windows"])
        total, formula = 0, []
        for way in ("forward", "backward"):
            w = v.get(way, {})
            if "ms" in w:
                line[f"{way} ms"] = f"{w['ms']['median']:.3g}"
                base = first.get(way, {}).get("ms", w["ms"])["median"]
                line[way] = f"{w['ms']['median'] / base:.2f}x"
            if "sent_most" in w:
                line[f"sent {way}"] = _size(w["sent_most"])
                total += w["sent_most"]
                formula.append(w["as_formula"])
        if formula:
            line["sent"] = _size(total)
            line["formula"] = line["as formula"] = "yes" if all(formula) else "NO"
        if "balance" in v:
            line["work"], line["in order"] = f"{v['balance']:.3f}", f"{v['balance_unplaced']:.3f}"
            line["padding"] = f"{100 * v['padding'] / result.settings['tokens']:.1f} %"
        error = v.get("error") or {}
        gradients = [error[n] for n in ("dq", "dk", "dv") if n in error]
        if error:
            line["error out"] = f"{error['out']:.1e}"
            line["error"] = f"{max(error.values()):.1e}"
        if gradients:
            line["error gradients"] = f"{max(gradients):.1e}"
    return lines


def grid_name(ulysses: int, ring: int, windows: int = 1) -> str:
    """Ranks that share heads x places of the ring / windows of a double ring.

    >>> grid_name(8, 12, 3)
    '8x12/3'
    """
    return f"{ulysses}x{ring}" + (f"/{windows}" if windows > 1 else "")


def notes(result: Result) -> list[str]:
    """Why cells were not measured."""
    lines = [f"{n}: {c.outcome}: {c.reason}" for n, c in result.cells.items() if c.reason]
    if result.settings["device"] == "cpu":
        lines.append(
            "Ranks share the cores of one machine here: times show that it runs, not which scheme "
            "is fastest on GPUs."
        )
    return lines


def grid(result: Result, names: Sequence[str]) -> Table:
    """One row a scheme, in these columns."""
    lines = [[line.get(name, "") for name in names] for line in rows(result)]
    short = [
        name.replace("forward ms", "fwd ms").replace("backward ms", "bwd ms") for name in names
    ]
    return Table([*short[:2], *map(right, short[2:])], lines, keys=1)


def table(result: Result) -> Section:
    """The result for a terminal."""
    return Section(title(result), [grid(result, BRIEF), LEGEND, Items(notes(result))])


LEGEND = (
    "grid: ranks that share heads x places of the ring / windows of a double ring; "
    "work: most of a rank over the mean; error: largest, forward and gradients, against one "
    "process; torch: its own context_parallel; diffusers: its own schemes"
)


def title(result: Result) -> str:
    s = result.settings
    return (
        f"{s['mask']}, {s['tokens']:,} tokens on {s['ranks']} ranks ({s['device']}), heads "
        f"{s['heads'][0]}:{s['heads'][1]}, dimension {s['dim']}, {s['dtype']}"
    )


INTRODUCTION = (
    "Generated from saved results by `python -m regard.lab.bench.parallel OUT RESULT...`; not "
    "edited by hand. The grid is ranks that share heads x places of the ring / windows of a double "
    "ring. Forward and backward are times of the slowest rank, one process per rank, over those of "
    "the first scheme in the same run. Sent is the most that one rank sent, counted at every "
    "message; *as formula* says whether every rank sent exactly what the formula gives. Work is "
    "the area of the mask under a rank's queries, the most over the mean; *in order* is the same "
    "without zigzag placement. Errors are the largest difference from float64 attention in one "
    "process, as a share of its largest value. The row *torch* is "
    "`torch.distributed.tensor.experimental.context_parallel`; rows of *diffusers* are the schemes "
    "of its attention dispatcher."
)


def page(paths: Sequence[str | Path]) -> str:
    """The documentation page of saved results, in Markdown."""
    sections = [_section(load(path)) for path in paths]
    return Page("Context parallelism, measured", sections, [INTRODUCTION]).markdown()


def _section(result: Result) -> Section:
    s, e = result.settings, result.environment
    command = (
        f"torchrun --nproc-per-node {s['ranks']} -m regard bench parallel --mask {s['mask']} "
        f"--tokens-per-rank {s['tokens'] // s['ranks']} --heads {s['heads'][0]}:{s['heads'][1]} "
        f"--dim {s['dim']}"
    )
    machine = f"{e.get('cpu')}, {e.get('cores')} cores, torch {e.get('torch')}"
    timing = f"{s['timing']}; {machine}, threads of a rank: {e.get('threads')}."
    blocks = [grid(result, HEAD), Items(notes(result)), Code(command), timing]
    return Section(title(result), blocks)


def html(result: Result) -> str:
    """The table and the bytes of every scheme, as one HTML file that opens offline."""
    heading = "Bytes that a rank sends, counted, and by the formula"
    sections = [_section(result), Section(heading, [Html(bytes_svg(result))])]
    return Page("Context parallelism, measured", sections, [LEGEND]).html()


def bytes_svg(result: Result) -> str:
    """The most that one rank sent, a bar a scheme and direction; the formula is a mark on it."""
    drawn = []
    for name, cell in result.cells.items():
        for n, way in enumerate(("forward", "backward")):
            if cell.ok and "sent_most" in cell.values.get(way, {}):
                sent = cell.values[way]["sent_most"]
                formula = sum(cell.values[way]["formula"].values())
                words = _size(sent) + (f", formula {_size(formula)}" if sent != formula else "")
                drawn.append(Bar(f"{name}, {way}", sent, words, formula, n))
    return bars(
        drawn, "Bytes sent by a rank, counted and by formula", "bar: counted; mark: formula"
    )


def _size(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return ""
