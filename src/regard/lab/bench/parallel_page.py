"""A result of bench parallel as a terminal table, a Markdown page and an HTML page with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import kernels_page as look
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
    found = [f"{n}: {c.outcome}: {c.reason}" for n, c in result.cells.items() if c.reason]
    if result.settings["device"] == "cpu":
        found.append(
            "Ranks share the cores of one machine here: times show that it runs, not which scheme "
            "is fastest on GPUs."
        )
    return found


def table(result: Result) -> Any:
    """The result for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=title(result),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for number, name in enumerate(BRIEF):
        short = name.replace("forward", "fwd").replace("backward", "bwd")
        left = number < 2
        shown.add_column(Text(short), justify="left" if left else "right", no_wrap=True)
    for line in rows(result):
        shown.add_row(*(Text(line.get(name, "")) for name in BRIEF))
    return Group(shown, Text(LEGEND), *(Text(note, style="dim") for note in notes(result)))


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


def page(paths: Sequence[str | Path]) -> str:
    """The documentation page of saved results, in Markdown."""
    lines = [
        "# Context parallelism, measured",
        "",
        "Generated from saved results by `python -m regard.lab.bench.parallel OUT RESULT...`; not",
        "edited by hand. The grid is ranks that share heads x places of the ring / windows of a",
        "double ring. Forward and backward are times of the slowest rank, one process per rank,",
        "over those of the first scheme in the same run. Sent is the most",
        "that one rank sent, counted at every message; *as formula* says whether every rank sent",
        "exactly what the formula gives. Work is the area of the mask under a rank's queries, the",
        "most over the mean; *in order* is the same without zigzag placement. Errors are the",
        "largest difference from float64 attention in one process, as a share of its largest",
        "value. The row *torch* is `torch.distributed.tensor.experimental.context_parallel`; rows",
        "of *diffusers* are the schemes of its attention dispatcher.",
        "",
    ]
    for path in paths:
        result = load(path)
        lines += [f"## {title(result)}", "", "| " + " | ".join(HEAD) + " |"]
        lines += ["| --- | --- |" + " ---: |" * (len(HEAD) - 2)]
        lines += ["| " + " | ".join(r.get(n, "") for n in HEAD) + " |" for r in rows(result)]
        lines += ["", *(f"- {note}" for note in notes(result)), ""]
        e = result.environment
        command = (
            f"torchrun --nproc-per-node {result.settings['ranks']} -m regard bench parallel "
            f"--mask {result.settings['mask']} "
            f"--tokens-per-rank {result.settings['tokens'] // result.settings['ranks']} "
            f"--heads {result.settings['heads'][0]}:{result.settings['heads'][1]} "
            f"--dim {result.settings['dim']}"
        )
        lines += ["```", command, "```", ""]
        machine = f"{e['cpu']}, {e['cores']} cores, torch {e['torch']}"
        timing = result.settings["timing"]
        lines += [f"{timing}; {machine}, threads of a rank: {e['threads']}.", ""]
    return "\n".join(lines)


def html(result: Result) -> str:
    """The table and the bytes of every scheme, as one HTML file that opens offline."""
    grid = [list(HEAD), *([line.get(name, "") for name in HEAD] for line in rows(result))]
    e = result.environment
    machine = f"{e.get('cpu')}, {e.get('cores')} cores, torch {e.get('torch')}"
    body = ["<h1>Context parallelism, measured</h1>", f"<p>{escape(title(result))}</p>"]
    body += [look.table_html(grid, fold=False), f"<p>{escape(LEGEND)}</p>"]
    body += ["<h2>Bytes that a rank sends, counted, and by the formula</h2>", bytes_svg(result)]
    body += [f"<p>{escape(note)}</p>" for note in notes(result)]
    timing = f"{result.settings['timing']}; {machine}, threads of a rank: {e.get('threads')}."
    return look.document("Context parallelism", [*body, f"<p>{escape(timing)}</p>"])


def bytes_svg(result: Result) -> str:
    """The most that one rank sent, a bar a scheme and direction; the formula is a mark on it."""
    bars = [
        (f"{name}, {way}", cell.values[way]["sent_most"], sum(cell.values[way]["formula"].values()))
        for name, cell in result.cells.items()
        for way in ("forward", "backward")
        if cell.ok and "sent_most" in cell.values.get(way, {})
    ]
    out = look.svg(760, 48 + 26 * max(len(bars), 1), "Bytes sent by a rank, counted and by formula")
    if not bars:
        return "\n".join([*out, '<text x="60" y="40">nothing was counted</text></svg>', ""])
    out.append('<text x="180" y="20" fill="#666">bar: counted; mark: formula</text>')
    most = max(max(sent, formula) for _, sent, formula in bars) or 1
    for n, (label, sent, formula) in enumerate(bars):
        y, wide, at = 36 + 26 * n, 440 * sent / most, 180 + 440 * formula / most
        color = look.COLORS[0 if label.endswith("forward") else 1]
        words = _size(sent) if sent == formula else f"{_size(sent)}, formula {_size(formula)}"
        out += [
            f'<text x="172" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="180" y="{y}" width="{wide:.1f}" height="16" fill="{color}"/>',
            f'<path d="M{at:.1f} {y - 3}v22" stroke="#222" stroke-width="2.5"/>',
            f'<text x="{max(180 + wide, at) + 8:.1f}" y="{y + 12}">{words}</text>',
        ]
    return "\n".join([*out, "</svg>", ""])


def _size(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return ""
