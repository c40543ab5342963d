"""A result of bench see as a terminal table, a Markdown page and an SVG plot."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .record import Result, write_text
from .verdicts import (
    GIB,
    MIB,
    exponent,
    fits,
    judge,
    kernel_ratio,
    key_of,
    lengths_of,
    over,
    ratio,
    rows_of,
)

Grid = list[list[str]]
LABELS = {
    "plain": "plain model (torch's fused attention)",
    "eager": "output_attentions=True, all maps kept",
    "eager, layer by layer": "eager attention, each map reduced and let go",
    "nnsight": "nnsight, each map reduced and let go",
    "transformer_lens": "TransformerLens, each map reduced and let go",
}
SHORT = {"out of memory": "no memory", "timed out": "too slow", "not installed": "not installed"}


def table(result: Result) -> Any:
    """The result for a terminal: time, memory, what fits, kernels, verdicts."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for title, grid in _grids(result):
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(grid[0]):
            shown.add_column(Text(name), justify="left" if number == 0 else "right")
        for line in grid[1:]:
            shown.add_row(*(Text(cell) for cell in line))
        parts.append(shown)
    for note in _failures(result):
        parts.append(Text(note))
    for verdict in judge(result):
        if verdict["verdict"] != "not measured":
            parts.append(Text(f"{verdict['verdict']}: {verdict['rule']} ({verdict['measured']})"))
    return Group(*parts)


def page(
    result: Result,
    path: str | Path = "docs/bench-see.md",
    plot: str | Path = "docs/img/bench-see.svg",
    source: str = "benchmarks/results/see.json",
) -> Path:
    """Write the Markdown page and its plot, each whole or not at all; returns the page."""
    path, plot = Path(path), Path(plot)
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_text(plot, svg(result))
    write_text(
        path, markdown(result, os.path.relpath(plot, path.parent).replace(os.sep, "/"), source)
    )
    return path


def markdown(result: Result, plot: str, source: str) -> str:
    """The page as text."""
    s, env = result.settings, result.environment
    shape = s.get("shape", {})
    lines = [
        "# What watching attention costs",
        "",
        f"<!-- Generated from {source} by `python -m regard.lab.bench.page`; do not edit. -->",
        "",
        f"Model: {_md(s['model'])}, {shape.get('layers', '?')} layers, "
        f"{shape.get('heads', '?')} query and {shape.get('kv_heads', '?')} key heads, "
        f"{s['dtype']}, batch 1. Every ratio compares with the plain model on torch's fused "
        "attention, timed in the same process just before.",
        "",
        f"![Time and memory over the plain model, by length]({plot})",
        "",
        "## Targets, stated before the run",
        "",
    ]
    lines += _md_table(
        [
            ["Target", "Measured", "Verdict"],
            *([v["rule"], v["measured"] or "-", v["verdict"]] for v in judge(result)),
        ],
        right=False,
    )
    for title, grid in _grids(result):
        lines += ["", f"## {title}", "", *_md_table(grid)]
        lines += ["", _NOTES[title](result)] if title in _NOTES else []
    failures = _failures(result)
    if failures:
        lines += ["", "## What did not run", "", *(f"- {_md(f)}" for f in failures)]
    lines += ["", "## How it was measured", "", *_method(result)]
    machine = ", ".join(f"{k} {v}" for k, v in env.items())
    lines += ["", f"Machine: {_md(machine)}.", ""]
    return "\n".join(lines)


def _grids(result: Result) -> list[tuple[str, Grid]]:
    """The tables that this result has numbers for, with their titles."""
    full, last, kernel = (lengths_of(result, kind) for kind in ("all", "last", "kernel"))
    found: list[tuple[str, Grid]] = []
    if full:
        rows = rows_of(result)
        timed = [r for r in rows if r != "plain"]
        found.append((_TIME, _grid("", timed, full, lambda r, n: _time(result, n, r))))
        found.append((_MEMORY, _grid("MiB", rows, full, lambda r, n: _memory(result, n, r))))
        found.append((_FITS, _fits_grid(result, rows)))
    if last:
        row = "received + entropy"
        grid = _grid("MiB", ["plain", row], last, lambda r, n: _memory(result, n, r, "last", False))
        grid.append(["difference", *(_mib(over(result, n, row, "last")) for n in last)])
        found.append((_GROWTH, grid))
    if kernel:
        names = list(
            next(c for k, c in result.cells.items() if "/kernel" in k).values["seconds"] or []
        )
        found.append(
            (
                _KERNEL,
                _grid(
                    "",
                    [n for n in names if n != "sdpa"],
                    kernel,
                    lambda r, n: _times(kernel_ratio(result, n, r)),
                ),
            )
        )
    return found


_TIME = "Time, as a multiple of the plain forward"
_MEMORY = "Peak memory of the forward over the plain forward"
_FITS = "What fits"
_GROWTH = "Memory growth with the logits of the last position only"
_KERNEL = "One attention call, as a multiple of torch's fused attention"


def _grid(
    corner: str, rows: Sequence[str], lengths: Sequence[int], cell: Callable[[str, int], str]
) -> Grid:
    head = [corner, *(_k(n) for n in lengths)]
    return [head, *([LABELS.get(r, r), *(cell(r, n) for n in lengths)] for r in rows)]


def _time(result: Result, n: int, row: str) -> str:
    return _times(ratio(result, n, row)) or _why(result, key_of(n, row))


def _times(r: dict[str, float] | None) -> str:
    if r is None:
        return ""
    middle = f"{r['median']:.2f}"
    return middle if r["low"] == r["high"] else f"{middle} ({r['low']:.2f} to {r['high']:.2f})"


def _memory(result: Result, n: int, row: str, logits: str = "all", extra: bool = True) -> str:
    key = key_of(n, row, logits)
    cell = result.get(key)
    if cell is None:
        return _why(result, key)
    if row == "plain" or not extra:
        own = f"{cell.values['growth'] / MIB:,.0f}"
        return f"{own} itself" if extra else own
    return _mib(over(result, n, row, logits))


def _mib(amount: float | None) -> str:
    return "" if amount is None else f"{amount / MIB:+,.0f}"


def _why(result: Result, key: str) -> str:
    cell = result.cells.get(key)
    return "not run" if cell is None else SHORT.get(cell.outcome, cell.outcome)


def _fits_grid(result: Result, rows: Sequence[str]) -> Grid:
    limit = result.settings["memory_limit"] / GIB
    grid = [["", f"longest measured within {limit:g} GiB", "longest by a fit (extrapolated)"]]
    for row in rows:
        found = fits(result, row)
        if found is None:
            grid.append([LABELS.get(row, row), "none", ""])
            continue
        reach = found["extrapolated"]
        measured = found["measured"]
        shown = "none" if measured is None else _k(measured)
        if measured is not None and not found["bounded"]:
            shown += " and longer"
        grid.append(
            [LABELS.get(row, row), shown, "" if reach is None else f"about {_about(reach)}"]
        )
    return grid


def _about(n: int) -> str:
    """Two digits are all that a fit is worth."""
    if n < 1024:
        return str(n)
    thousands = n / 1024
    return f"{thousands:.1f}k" if thousands < 10 else f"{thousands:.0f}k"


def _failures(result: Result) -> list[str]:
    lines = []
    for key, cell in sorted(result.cells.items(), key=lambda kv: (int(kv[0].split("/")[0]), kv[0])):
        if not cell.ok:
            n, kind, *row = key.split("/", 2)
            name = row[0] if row else kind
            lines.append(f"{LABELS.get(name, name)} at {_k(int(n))}: {cell.outcome}. {cell.reason}")
    return lines


def _note_time(result: Result) -> str:
    return (
        "Median over the pairs (plain, row) timed in turn, with the least and the greatest; "
        "one number where "
        "there was one pair. The rows without a library's name run under `regard.watch`, whole "
        "forward, all "
        "logits, results read. The other routes reduce the maps of all layers to received "
        "attention and entropy."
    )


def _note_memory(result: Result) -> str:
    return (
        "Peak resident memory while the forward runs, less what the process held just before, "
        "less the same of "
        "the plain forward (which is given in the first line). Negative: less than the plain "
        "forward takes."
    )


def _note_fits(result: Result) -> str:
    return (
        "The whole process counts: libraries, weights, cache and the logits of all positions. "
        "The fit is a "
        "parabola through the peaks at the three greatest measured lengths; nothing was run there."
    )


def _note_growth(result: Result) -> str:
    positions = result.settings.get("shape", {}).get("positions")
    beyond = [n for n in lengths_of(result, "last") if positions and n > positions]
    row = "received + entropy"
    known = [(n, over(result, n, row, "last")) for n in lengths_of(result, "last")]
    slope = exponent([(n, y) for n, y in known if y is not None])
    text = "The vocabulary matrix is left out, so that it hides nothing."
    if slope is not None:
        text += (
            f" A power law through the differences has exponent {slope:.2f}; a matrix would give 2."
        )
    if beyond:
        text += (
            f" The model was trained for {positions} positions: what it answers beyond them "
            "means little, what "
            "it costs is the same."
        )
    return text


def _note_kernel(result: Result) -> str:
    shape = result.settings.get("shape", {})
    return (
        f"Random q, k, v; {shape.get('heads', '?')} query heads, {shape.get('kv_heads', '?')} "
        "key heads, head "
        "dimension 64, causal. `received` and `entropy` alone are given the log-sum-exp; "
        "`attend + received` "
        "computes it."
    )


_NOTES: dict[str, Callable[[Result], str]] = {
    _TIME: _note_time,
    _MEMORY: _note_memory,
    _FITS: _note_fits,
    _GROWTH: _note_growth,
    _KERNEL: _note_kernel,
}


def _method(result: Result) -> list[str]:
    busy = [c.values["others_busy"] for c in result.cells.values() if "others_busy" in c.values]
    loaded = sum(b >= 0.15 for b in busy)
    text = "a shipped text" if result.settings.get("shape", {}).get("text") else "random ids"
    lines = [
        f"- Input: {text}, repeated where it is too short. Seed {result.settings['seed']}.",
        "- Memory and time are measured in processes apart. In the one for memory, freed memory "
        "goes back to the system at once and the peak is reset before every forward, so that it "
        "counts live tensors and not what a heap happens to hold. A plain forward warms either "
        f"process. For the time up to {result.settings['repeats']} pairs of plain and row follow "
        "in turn (more for received + entropy at 4k, which decides the targets); single facts from "
        "4k tokens on have one pair. The eager routes and the peer "
        "have processes of their own in every cell, the rows of `regard.watch` share two per "
        "length.",
        "- Before a cell the bench waits, up to a minute, while other processes use 15 % of "
        "the machine or more. "
        f"At {loaded} of {len(busy)} cells they still did.",
    ]
    peers = {
        c.settings["peer"]: c.values["peer_version"]
        for c in result.cells.values()
        if "peer_version" in c.values
    }
    for name, version in sorted(peers.items()):
        lines.append(f"- {name} {version}, in an environment of its own (`make peers`).")
    lines.append(
        "- Seconds stand in the JSON only: they say more about the machine than about the methods."
    )
    return lines


# -- the plot --------------------------------------------------------------------------------------
_LINES = (
    ("received", "#1d6fb8", ""),
    ("received + entropy", "#0b3d70", ""),
    ("all facts", "#5aa9e6", "6 4"),
    ("eager", "#c2452d", ""),
    ("eager, layer by layer", "#d98c1f", ""),
    ("nnsight", "#7a5195", ""),
    ("transformer_lens", "#3f8f5b", ""),
)
Point = tuple[float, float]


def svg(result: Result) -> str:
    """Two charts side by side, by length: time and memory over the plain model."""
    lengths = lengths_of(result)
    times: dict[str, list[Point]] = {}
    memory: dict[str, list[Point]] = {}
    for row, _, _ in _LINES:
        for n in lengths:
            if found := ratio(result, n, row):
                times.setdefault(row, []).append((n, found["median"]))
            extra = over(result, n, row)
            if extra is not None and extra >= MIB:  # a logarithm shows no zero
                memory.setdefault(row, []).append((n, extra / MIB))
    drawn = [line for line in _LINES if line[0] in times or line[0] in memory]
    height = 404 + 22 * math.ceil(len(drawn) / 3)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Time and memory over the plain model, by length</title>",
        f'<rect width="960" height="{height}" fill="#ffffff"/>',
    ]
    out += _chart(50, "Time, as a multiple of the plain forward", times, lengths, "x", 1.0)
    out += _chart(540, "Memory over the plain forward, MiB", memory, lengths, "", None)
    for number, (row, colour, dash) in enumerate(drawn):
        x, y = 50 + 310 * (number % 3), 400 + 22 * (number // 3)
        out.append(_stroke(f"M{x} {y - 4}h26", colour, dash))
        out.append(f'<text x="{x + 34}" y="{y}" fill="#222">{escape(_legend(row))}</text>')
    return "\n".join([*out, "</svg>", ""])


def _legend(row: str) -> str:
    names = {"eager": "output_attentions=True", "transformer_lens": "TransformerLens"}
    return names.get(row, row)


def _chart(
    left: int,
    title: str,
    series: dict[str, list[Point]],
    lengths: Sequence[int],
    unit: str,
    least: float | None,
) -> list[str]:
    top, width, height = 50, 370, 290
    out = [f'<text x="{left}" y="26" fill="#222" font-weight="600">{escape(title)}</text>']
    values = [y for points in series.values() for _, y in points]
    if not values or not lengths:
        return [*out, f'<text x="{left}" y="90" fill="#666">nothing was measured</text>']
    low = math.floor(math.log2(min(values) if least is None else min(least, *values)))
    high = max(math.ceil(math.log2(max(values))), low + 1)
    x0, x1 = math.log2(lengths[0]), math.log2(lengths[-1])

    def at(n: float, y: float) -> Point:
        across = (math.log2(n) - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (math.log2(y) - low) / (high - low)
        return left + 15 + across * (width - 30), top + height * (1 - up)

    step = max(1, math.ceil((high - low) / 8))
    for power in range(low, high + 1, step):
        y = at(lengths[0], 2.0**power)[1]
        out.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#e3e3e3"/>')
        label = f"{2.0**power:g}{unit}"
        out.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" fill="#666" text-anchor="end">{label}</text>'
        )
    for n in lengths:
        x = at(n, 2.0**low)[0]
        out.append(
            f'<text x="{x:.1f}" y="{top + height + 20}" fill="#666" text-anchor="middle">'
            f"{_k(n)}</text>"
        )
    for row, colour, dash in _LINES:
        points = [at(*p) for p in series.get(row, [])]
        if points:
            out.append(_stroke("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), colour, dash))
            out += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points
            ]
    return out


def _stroke(d: str, colour: str, dash: str) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2.2"{dashed}/>'


# -- small things ----------------------------------------------------------------------------------
def _k(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _md(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _md_table(grid: Grid, right: bool = True) -> list[str]:
    rule = ["---", *(["---:" if right else "---"] * (len(grid[0]) - 1))]
    lines = [grid[0], rule, *grid[1:]]
    return ["| " + " | ".join(_md(c) or " " for c in line) + " |" for line in lines]


def main() -> None:
    """Regenerate docs/bench-see.md from benchmarks/results/see.json."""
    from .record import load

    page(load("benchmarks/results/see.json"))


if __name__ == "__main__":
    main()
