"""A result of bench see as a terminal table, a Markdown page and an SVG plot."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from regard.report.chart import Chart, Line, Panel, Point
from regard.report.document import Items, Page, Section
from regard.report.table import Table, right

from .record import Result, targets, write_text
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

LABELS = {
    "plain": "plain model (torch's fused attention)",
    "eager": "output_attentions=True, all maps kept",
    "eager, layer by layer": "eager attention, each map reduced and let go",
    "nnsight": "nnsight, each map reduced and let go",
    "transformer_lens": "TransformerLens, each map reduced and let go",
}
SHORT = {"out of memory": "no memory", "timed out": "too slow", "not installed": "not installed"}


def page(
    result: Result,
    path: str | Path = "docs/bench-see.md",
    plot: str | Path = "docs/img/bench-see.svg",
    source: str = "benchmarks/results/see.json",
) -> Path:
    """Write the Markdown page and its plot, each whole or not at all; returns the page."""
    path, plot = Path(path), Path(plot)
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_text(plot, chart(result).svg())
    write_text(
        path, markdown(result, os.path.relpath(plot, path.parent).replace(os.sep, "/"), source)
    )
    return path


def markdown(result: Result, plot: str, source: str) -> str:
    """The page as text."""
    return report(result, plot, f"{source} by `python -m regard.lab.bench.page`").markdown()


def table(result: Result) -> Page:
    """The same for a terminal."""
    return report(result)


def report(result: Result, plot: str = "", source: str = "") -> Page:
    """Everything the result says: targets, time, memory, what fits, kernels."""
    s, shape = result.settings, result.settings.get("shape", {})
    intro = [
        f"Model: {s['model']}, {shape.get('layers', '?')} layers, {shape.get('heads', '?')} query "
        f"and {shape.get('kv_heads', '?')} key heads, {s['dtype']}, batch 1. Every ratio compares "
        "with the plain model on torch's fused attention, timed in the same process just before.",
        chart(result, plot),
    ]
    sections = [targets(judge(result))]
    for title, grid in _grids(result):
        sections.append(
            Section(title, [grid, *([_NOTES[title](result)] if title in _NOTES else [])])
        )
    if failures := _failures(result):
        sections.append(Section("What did not run", [Items(failures)]))
    machine = ", ".join(f"{k} {v}" for k, v in result.environment.items())
    method = [Items(_method(result)), f"Machine: {machine}."]
    sections.append(Section("How it was measured", method))
    return Page("What watching attention costs", sections, intro, source=source)


def _grids(result: Result) -> list[tuple[str, Table]]:
    """The tables that this result has numbers for, with their titles."""
    full, last, kernel = (lengths_of(result, kind) for kind in ("all", "last", "kernel"))
    tables: list[tuple[str, Table]] = []
    if full:
        rows = rows_of(result)
        timed = [r for r in rows if r != "plain"]
        tables.append((_TIME, _grid("", timed, full, lambda r, n: _time(result, n, r))))
        tables.append((_MEMORY, _grid("MiB", rows, full, lambda r, n: _memory(result, n, r))))
        tables.append((_FITS, _fits_grid(result, rows)))
    if last:
        row = "received + entropy"

        def growth(name: str, n: int) -> str:
            if name == "difference":
                return _mib(over(result, n, row, "last"))
            return _memory(result, n, name, "last", False)

        tables.append((_GROWTH, _grid("MiB", ["plain", row, "difference"], last, growth)))
    if kernel:
        names = list(
            next(c for k, c in result.cells.items() if "/kernel" in k).values["seconds"] or []
        )
        tables.append(
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
    return tables


_TIME = "Time, as a multiple of the plain forward"
_MEMORY = "Peak memory of the forward over the plain forward"
_FITS = "What fits"
_GROWTH = "Memory growth with the logits of the last position only"
_KERNEL = "One attention call, as a multiple of torch's fused attention"


def _grid(
    corner: str, rows: Sequence[str], lengths: Sequence[int], cell: Callable[[str, int], str]
) -> Table:
    cells = [[LABELS.get(r, r), *(cell(r, n) for n in lengths)] for r in rows]
    return Table([corner, *(right(_k(n)) for n in lengths)], cells, keys=1)


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
        growth = f"{cell.values['growth'] / MIB:,.0f}"
        return f"{growth} itself" if extra else growth
    return _mib(over(result, n, row, logits))


def _mib(amount: float | None) -> str:
    return "" if amount is None else f"{amount / MIB:+,.0f}"


def _why(result: Result, key: str) -> str:
    cell = result.cells.get(key)
    return "not run" if cell is None else SHORT.get(cell.outcome, cell.outcome)


def _fits_grid(result: Result, rows: Sequence[str]) -> Table:
    limit = result.settings["memory_limit"] / GIB
    head = ["", right(f"longest measured within {limit:g} GiB")]
    head.append(right("longest by a fit (extrapolated)"))
    grid = []
    for row in rows:
        fit = fits(result, row)
        if fit is None:
            grid.append([LABELS.get(row, row), "none", ""])
            continue
        reach = fit["extrapolated"]
        measured = fit["measured"]
        shown = "none" if measured is None else _k(measured)
        if measured is not None and not fit["bounded"]:
            shown += " and longer"
        grid.append(
            [LABELS.get(row, row), shown, "" if reach is None else f"about {_about(reach)}"]
        )
    return Table(head, grid)


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
        "Median over the pairs (plain, row) timed in turn, with the least and the greatest; one "
        "number where there was one pair. The rows without a library's name run under "
        "`regard.watch`, whole forward, all logits, results read. The other routes reduce the maps "
        "of all layers to received attention and entropy."
    )


def _note_memory(result: Result) -> str:
    return (
        "Peak resident memory while the forward runs, less what the process held just before, less "
        "the same of the plain forward (which is given in the first line). Negative: less than the "
        "plain forward takes."
    )


def _note_fits(result: Result) -> str:
    return (
        "The whole process counts: libraries, weights, cache and the logits of all positions. The "
        "fit is a parabola through the peaks at the three greatest measured lengths; nothing was "
        "run there."
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
            f" The model was trained for {positions} positions: what it answers beyond them means "
            "little, what it costs is the same."
        )
    return text


def _note_kernel(result: Result) -> str:
    shape = result.settings.get("shape", {})
    return (
        f"Random q, k, v; {shape.get('heads', '?')} query heads, {shape.get('kv_heads', '?')} key "
        "heads, head dimension 64, causal. `received` and `entropy` alone are given the "
        "log-sum-exp; `attend + received` computes it."
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
        f"Input: {text}, repeated where it is too short. Seed {result.settings['seed']}.",
        "Memory and time are measured in processes apart. In the one for memory, freed memory goes "
        "back to the system at once and the peak is reset before every forward, so that it counts "
        "live tensors and not what a heap happens to hold. A plain forward warms either process. "
        f"For the time up to {result.settings['repeats']} pairs of plain and row follow in turn "
        "(more for received + entropy at 4k, which decides the targets); single facts from 4k "
        "tokens on have one pair. The eager routes and the peer have processes of their own in "
        "every cell, the rows of `regard.watch` share two per length.",
        "Before a cell the bench waits, up to a minute, while other processes use 15 % of the "
        f"machine or more. At {loaded} of {len(busy)} cells they still did.",
    ]
    peers = {
        c.settings["peer"]: c.values["peer_version"]
        for c in result.cells.values()
        if "peer_version" in c.values
    }
    for name, version in sorted(peers.items()):
        lines.append(f"{name} {version}, in an environment of its own (`make peers`).")
    lines.append(
        "Seconds stand in the JSON only: they say more about the machine than about the methods."
    )
    return lines


# -- the plot --------------------------------------------------------------------------------------
_LINES = {
    "received": "received",
    "received + entropy": "received + entropy",
    "all facts": "all facts",
    "eager": "output_attentions=True",
    "eager, layer by layer": "eager, layer by layer",
    "nnsight": "nnsight",
    "transformer_lens": "TransformerLens",
}


def chart(result: Result, file: str = "") -> Chart:
    """Two panels side by side, by length: time and memory over the plain model."""
    lengths = lengths_of(result)
    times, memory = [], []
    for row, name in _LINES.items():
        faster: list[Point] = []
        extra: list[Point] = []
        for n in lengths:
            if measured := ratio(result, n, row):
                faster.append((n, measured["median"]))
            more = over(result, n, row)
            if more is not None and more >= MIB:  # a logarithm shows no zero
                extra.append((n, more / MIB))
        times.append(Line(name, faster, dashed=row == "all facts"))
        memory.append(Line(name, extra, dashed=row == "all facts"))
    marks = [(n, _k(n)) for n in lengths]
    panels = [
        Panel("tokens", "Time, as a multiple of the plain forward", times, 2, 2, marks, unit="x"),
        Panel("tokens", "Memory over the plain forward, MiB", memory, 2, 2, marks),
    ]
    return Chart(panels, "Time and memory over the plain model, by length", file=file)


# -- small things ----------------------------------------------------------------------------------
def _k(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def main() -> None:
    """Regenerate docs/bench-see.md from benchmarks/results/see.json."""
    from .record import load

    page(load("benchmarks/results/see.json"))


if __name__ == "__main__":
    main()
