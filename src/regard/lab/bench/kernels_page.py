"""A result of bench kernels as one page: for a terminal, as Markdown and as HTML, with plots."""

from __future__ import annotations

import math
import os
from pathlib import Path

from regard.report.chart import Chart, Line, Panel
from regard.report.document import Items, Page, Section
from regard.report.table import Table, from_grid

from .kernels import key_of
from .kernels_verdicts import cells, judge, k, values, within_reach
from .record import NO_MEMORY, Cell, Result, targets, write_text

SHORT = {NO_MEMORY: "no memory", "unsupported": "–", "not installed": "–", "failed": "failed"}
DRAWN = ("attend", "sdpa", "naive", "tiled", "flex", "flex-compiled", "sdpa-math")
MOST = 8  # kernels in a plot


def present(result: Result) -> list[str]:
    """The kernels that were measured, or might have been, at least once."""
    idle = ("unsupported", "not installed")
    return list(dict.fromkeys(c.settings["kernel"] for c in cells(result) if c.outcome not in idle))


def absent(result: Result) -> list[tuple[str, str]]:
    """(kernel, reason) of those that took no single cell."""
    there = present(result)
    reasons: dict[str, str] = {}
    for cell in cells(result):
        if cell.settings["kernel"] not in there:
            word = "not installed: " if cell.outcome == "not installed" else ""
            reasons.setdefault(cell.settings["kernel"], word + cell.reason)
    return list(reasons.items())


def failures(result: Result) -> list[tuple[str, list[str]]]:
    """(reason, cells) of everything that a present kernel did not do, equal reasons together."""
    there, groups = present(result), dict[str, list[str]]()
    for key, cell in result.cells.items():
        if key != "machine" and cell.settings["kernel"] in there and not cell.ok:
            label = f"{cell.settings['kernel']}: {cell.reason}"
            groups.setdefault(label, []).append(
                f"{cell.settings['mask']} {k(cell.settings['tokens'])} "
                f"{'backward' if cell.settings['backward'] else 'forward'}"
            )
    return list(groups.items())


def _number(cell: Cell | None, what: str) -> str:
    if cell is None:
        return ""
    if not cell.ok:
        return SHORT.get(cell.outcome, cell.outcome)
    if what == "memory":
        return f"{cell.values['peak_bytes'] / 2**20:.0f}"
    mark = "" if cell.values["exact"] else " wrong"
    return f"{cell.values['throughput'] / 1e9:.1f}{mark}"


def grids(result: Result) -> list[tuple[str, Table]]:
    """(title, table) for throughput and memory, a length and direction each."""
    there, tables = present(result), []
    for total in values(result, "tokens"):
        for backward in values(result, "backward"):
            keys = {m: [key_of(n, m, total, backward) for n in there]
                    for m in values(result, "mask")}  # fmt: skip
            rows = [m for m, names in keys.items() if any(n in result.cells for n in names)]
            way = "backward" if backward else "forward"
            for what, title in (
                ("throughput", f"GFLOP/s of allowed pairs, {way}, {k(total)} tokens"),
                ("memory", f"Peak memory in MiB, {way}, {k(total)} tokens"),
            ):
                grid = [["mask", "kept", *there]]
                for mask in rows:
                    line = [result.cells.get(key_of(n, mask, total, backward)) for n in there]
                    share = next(c.settings["area_share"] for c in line if c is not None)
                    grid.append([mask, f"{share:.3f}", *(_number(c, what) for c in line)])
                if len(grid) > 1:
                    tables.append((title, from_grid(grid, keys=2)))
    return tables


REACH = (
    "A kernel that only leaves out what the mask forbids can be 1 / kept times as fast as one that "
    "computes all pairs: `most by its area`. Above it lies what reading the dense mask costs the "
    "other. Where that most is below the target, the target is beyond the area of the mask."
)


def support(result: Result) -> Table:
    """Kernels x masks: how the forward, then the backward ended, over all lengths."""
    marks = {"measured": "yes", "unsupported": "no", "not installed": "absent",
             NO_MEMORY: "no memory", "failed": "failed"}  # fmt: skip
    masks, ways = values(result, "mask"), values(result, "backward")
    grid = [["kernel", *masks]]
    for kernel in values(result, "kernel"):
        line = [kernel]
        for mask in masks:
            ends = []
            for backward in ways:
                outcomes = [c.outcome for c in cells(result)
                         if (c.settings["kernel"], c.settings["mask"], c.settings["backward"])
                         == (kernel, mask, backward)]  # fmt: skip
                ends.append(" then ".join(dict.fromkeys(marks.get(o, o) for o in outcomes)))
            line.append(" / ".join(ends) if len(set(ends)) > 1 else ends[0])
        grid.append(line)
    return from_grid(grid, words=range(len(grid[0])), keys=1)


def page(result: Result, target: str | Path, source: str, plots: str | Path | None = None) -> Path:
    """Write the Markdown page, and its plots into `plots`, a folder beside or below it."""
    target = Path(target)
    folder = Path(plots) if plots is not None else target.parent / "img"
    folder.mkdir(parents=True, exist_ok=True)
    where = Path(os.path.relpath(folder, target.parent)).as_posix()
    for chart in charts(result, f"{where}/{target.stem}"):
        write_text(target.parent / chart.file, chart.svg())
    write_text(target, markdown(result, source, f"{where}/{target.stem}"))
    return target


def markdown(result: Result, source: str, images: str = "img/bench-kernels") -> str:
    """The page as Markdown, its pictures being `images` + .svg and `images` + -roofline.svg; the
    same result gives the same text.
    """
    note = f"Generated from `{source}`; nothing here is typed. {NOTE}"
    return report(result, [note, *_machine(result)], images).markdown()


def html(result: Result) -> str:
    """The same as one HTML file that opens offline."""
    return report(result, [NOTE, *_machine(result)]).html()


def table(result: Result) -> Page:
    """The same for a terminal."""
    return report(result, _machine(result))


NOTE = (
    "Throughput counts the pairs a mask allows, never the whole square, so masks compare; backward "
    "counts 2.5 times forward. Timed in turns, medians of a shared machine: compare within a "
    "table, not across machines, and never read the order of CPU kernels as that of GPU kernels."
)


def report(result: Result, intro: list[str], images: str = "") -> Page:
    """Everything the result says: targets, plots, tables, and what was not measured."""
    first, reach = targets(judge(result)), within_reach(result)
    sections = [first, Section("Plots", charts(result, images))]
    if reach[1]:
        title = f"attend against sdpa with a dense mask, {k(reach[0])} tokens"
        sections.insert(1, Section(title, [from_grid(reach[1], words=(0, 5))], REACH))
    for title, grid in grids(result):
        sections.append(Section(title, [grid]))
    kept = "`kept` is the share of all pairs that the mask allows; – is unsupported."
    able = [support(result), kept]
    sections.append(Section("Who can do what", able, "Forward / backward, where they differ."))
    if absent(result):
        rows = Table(["kernel", "why"], absent(result))
        sections.append(Section("Not there, or not for this device", [rows]))
    if failures(result):
        lines = Items([f"{reason} ({_some(where)})" for reason, where in failures(result)])
        sections.append(Section("What was not measured, and why", [lines]))
    return Page("Attention kernels, masks and lengths", sections, intro)


def _machine(result: Result) -> list[str]:
    e, s = result.environment, result.settings
    top = result.cells.get("machine")
    lines = [
        f"{e.get('cpu')}, {e.get('threads')} of {e.get('cores')} cores used, device "
        f"{e.get('device')}; torch {e.get('torch')}, transformers {e.get('transformers')}. "
        f"{s['heads']} query heads, {s['kv_heads']} key heads of {s['dim']}, {s['dtype']}, "
        f"{s['rounds']} rounds, seed {s['seed']}; a call that would build more than "
        f"{s['memory_limit_gib']:g} GiB is not started.",
    ]
    if top is not None:
        lines.append(
            f"Ceilings measured at the start of the run: {top.values['flops'] / 1e9:.0f} GFLOP/s "
            f"(matrix product), {top.values['bandwidth'] / 1e9:.1f} GB/s (copy)."
        )
    return lines


# -- plots -----------------------------------------------------------------------------------------
def charts(result: Result, images: str = "") -> list[Chart]:
    """Throughput by length, and the roofline."""
    return [throughput(result, f"{images}.svg"), roofline(result, f"{images}-roofline.svg")]


def _plotted(result: Result) -> list[Cell]:
    """Cells of the forward; what is wrong is in the tables alone, as its speed says nothing."""
    return [c for c in cells(result)
            if c.ok and c.values["exact"] and not c.settings["backward"]]  # fmt: skip


def _drawn(result: Result, most: int) -> tuple[list[str], str]:
    """The kernels that are drawn, and how many others are in the tables alone."""
    there = dict.fromkeys(c.settings["kernel"] for c in _plotted(result))
    files = [n for n in there if n.partition(":")[0].endswith(".py")]
    drawn = [*[n for n in DRAWN if n in there], *files][:most]
    others = len(present(result)) - len(drawn)
    return drawn, f"; {others} more in the tables" if others else ""


def throughput(result: Result, file: str = "") -> Chart:
    """Throughput of the forward against length, one panel a mask."""
    lengths = values(result, "tokens")
    masks = [m for m in values(result, "mask") if ":" not in m] or values(result, "mask")
    drawn, others = _drawn(result, MOST)
    top = max([c.values["throughput"] for c in _plotted(result)], default=1.0)
    unit, size = ("TFLOP/s", 1e12) if top >= 1e13 else ("GFLOP/s", 1e9)

    def line(name: str, mask: str) -> Line:
        measured = [(t, result.get(key_of(name, mask, t, False))) for t in lengths]
        points = [
            (t, c.values["throughput"] / size) for t, c in measured if c and c.values["exact"]
        ]
        return Line(name, points)

    marks = [(t, k(t)) for t in lengths]
    panels = [
        Panel("", mask, [line(n, mask) for n in drawn], 2, 0, marks, (0, 1.08 * top / size))
        for mask in masks
    ]
    return Chart(
        panels,
        "Throughput against length, one panel a mask",
        columns=4,
        size=(262, 190),
        note=f"{unit} of allowed pairs, forward, against tokens{others}",
        file=file,
    )


def roofline(result: Result, file: str = "") -> Chart:
    """Throughput over intensity (FLOPs by bytes of q, k, v and out) under the roofs."""
    machine, s = result.cells.get("machine"), result.settings
    drawn, others = _drawn(result, MOST - 1)
    width = {"float64": 8, "float32": 4}.get(s["dtype"], 2)
    lines = []
    for name in drawn:
        points, tips = [], []
        for cell in _plotted(result):
            if cell.settings["kernel"] == name:
                once = cell.settings["tokens"] * s["dim"] * width
                intensity = cell.values["flops"] / (2 * once * (s["heads"] + s["kv_heads"]))
                points.append((intensity, cell.values["throughput"] / 1e9))
                tips.append(f"{name}, {cell.settings['mask']}, {k(cell.settings['tokens'])}")
        lines.append(Line(name, points, tips=tips, joined=False))
    known = [p for line in lines for p in line.points]
    if machine is not None and known:
        flops, band = machine.values["flops"] / 1e9, machine.values["bandwidth"] / 1e9
        ridge = flops / band
        xs, ys = zip((ridge, flops), *known)
        low, high = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
        left = max(10.0**low, 10.0 ** math.floor(math.log10(min(ys))) / band)
        roof = [(left, left * band), (ridge, flops), (10.0**high, flops)]
        lines.append(Line("the machine's ceilings", roof, corners=0, dashed=True))
    else:
        lines = []
    words = "FLOP by byte of q, k, v and out"
    panel = Panel(words, f"GFLOP/s, forward{others}", lines, 10, 10)
    title = "Roofline: throughput over arithmetic intensity, forward"
    return Chart([panel], title, size=(1048, 460), file=file)


# -- small things ----------------------------------------------------------------------------------
def _some(where: list[str]) -> str:
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    return ", ".join(where[:3]) + more


def main() -> None:
    """Regenerate docs/bench-kernels*.md from benchmarks/results/kernels*.json."""
    from .record import load

    for source in sorted(Path("benchmarks/results").glob("kernels*.json")):
        page(load(source), f"docs/bench-{source.stem}.md", source.as_posix())


if __name__ == "__main__":
    main()
