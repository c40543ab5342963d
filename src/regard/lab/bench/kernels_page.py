"""A result of bench kernels as a terminal table, a Markdown page, an HTML page and SVG plots."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .kernels import key_of
from .kernels_verdicts import cells, judge, k, values, within_reach
from .record import NO_MEMORY, Cell, Result, write_text

Grid = list[list[str]]
SHORT = {NO_MEMORY: "no memory", "unsupported": "–", "not installed": "–", "failed": "failed"}
# Okabe-Ito: told apart by every common type of vision
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a", "#111111")
DRAWN = ("attend", "sdpa", "naive", "tiled", "flex", "flex-compiled", "sdpa-math")


def present(result: Result) -> list[str]:
    """The kernels that were measured, or might have been, at least once."""
    idle = ("unsupported", "not installed")
    return list(dict.fromkeys(c.settings["kernel"] for c in cells(result) if c.outcome not in idle))


def absent(result: Result) -> list[tuple[str, str]]:
    """(kernel, reason) of those that took no single cell."""
    there = present(result)
    found: dict[str, str] = {}
    for cell in cells(result):
        if cell.settings["kernel"] not in there:
            word = "not installed: " if cell.outcome == "not installed" else ""
            found.setdefault(cell.settings["kernel"], word + cell.reason)
    return list(found.items())


def failures(result: Result) -> list[tuple[str, list[str]]]:
    """(reason, cells) of everything that a present kernel did not do, equal reasons together."""
    there, found = present(result), dict[str, list[str]]()
    for key, cell in result.cells.items():
        if key != "machine" and cell.settings["kernel"] in there and not cell.ok:
            label = f"{cell.settings['kernel']}: {cell.reason}"
            found.setdefault(label, []).append(
                f"{cell.settings['mask']} {k(cell.settings['tokens'])} "
                f"{'backward' if cell.settings['backward'] else 'forward'}"
            )
    return list(found.items())


def _number(cell: Cell | None, what: str) -> str:
    if cell is None:
        return ""
    if not cell.ok:
        return SHORT.get(cell.outcome, cell.outcome)
    if what == "memory":
        return f"{cell.values['peak_bytes'] / 2**20:.0f}"
    mark = "" if cell.values["exact"] else " wrong"
    return f"{cell.values['throughput'] / 1e9:.1f}{mark}"


def grids(result: Result) -> list[tuple[str, Grid]]:
    """(title, table) for throughput and memory, a length and direction each."""
    there, made = present(result), []
    for total in values(result, "tokens"):
        for backward in values(result, "backward"):
            keys = {m: [key_of(n, m, total, backward) for n in there]
                    for m in values(result, "mask")}  # fmt: skip
            rows = [m for m, names in keys.items() if any(n in result.cells for n in names)]
            way = "backward" if backward else "forward"
            for what, title in (
                ("throughput", f"GFLOP/s of allowed pairs, {way}, {k(total)} tokens"),
                ("memory", f"peak memory in MiB, {way}, {k(total)} tokens"),
            ):
                grid = [["mask", "kept", *there]]
                for mask in rows:
                    line = [result.cells.get(key_of(n, mask, total, backward)) for n in there]
                    share = next(c.settings["area_share"] for c in line if c is not None)
                    grid.append([mask, f"{share:.3f}", *(_number(c, what) for c in line)])
                if len(grid) > 1:
                    made.append((title, grid))
    return made


REACH = (
    "A kernel that only leaves out what the mask forbids can be 1 / kept times as fast as one that "
    "computes all pairs: `most by its area`. Above it lies what reading the dense mask costs the "
    "other. Where that most is below the target, the target is beyond the area of the mask."
)


def reach_title(total: int) -> str:
    return f"attend against sdpa with a dense mask, {k(total)} tokens"


def support(result: Result) -> Grid:
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
                found = [c.outcome for c in cells(result)
                         if (c.settings["kernel"], c.settings["mask"], c.settings["backward"])
                         == (kernel, mask, backward)]  # fmt: skip
                ends.append(" then ".join(dict.fromkeys(marks.get(o, o) for o in found)))
            line.append(" / ".join(ends) if len(set(ends)) > 1 else ends[0])
        grid.append(line)
    return grid


NARROW = 14  # letters of a kernel's name in a terminal before it is folded


def _cuts(names: Sequence[str], room: int) -> list[int]:
    """Where a table of these columns is cut so that each part fits in `room` letters.

    >>> _cuts(["attend", "sdpa", "flex"], 18)
    [0, 2, 3]
    """
    cuts, used = [0], 0
    for n, name in enumerate(names):
        wide = min(max(len(name), 6), NARROW) + 3
        if used and used + wide > room:
            cuts.append(n)
            used = 0
        used += wide
    return [*cuts, len(names)]


def table(result: Result, width: int | None = None) -> Any:
    """The result for a terminal of `width` letters; of this one by default."""
    from rich import box, get_console
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    width = width or get_console().width
    for title, grid in grids(result):
        longest = max(len(line[0]) for line in grid)
        cuts = _cuts(grid[0][2:], width - longest - 14)
        for start, stop in itertools.pairwise(n + 2 for n in cuts):
            shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            shown.add_column("mask", no_wrap=True)
            shown.add_column("kept", justify="right", no_wrap=True)
            for name in grid[0][start:stop]:
                shown.add_column(Text(name), justify="right", overflow="fold", max_width=NARROW)
            for line in grid[1:]:
                shown.add_row(*map(Text, [*line[:2], *line[start:stop]]))
            parts.append(shown)
    for name, reason in absent(result):
        parts.append(Text(f"{name}: {reason}", style="dim"))
    for reason, where in failures(result):
        parts.append(Text(f"{reason} ({_some(where)})", style="yellow"))
    total, grid = within_reach(result)
    if grid:
        shown = Table(title=reach_title(total), title_justify="left", box=box.SIMPLE_HEAD)
        for n, name in enumerate(grid[0]):
            shown.add_column(name, justify="left" if n in (0, 5) else "right", overflow="fold")
        for line in grid[1:]:
            shown.add_row(*map(Text, line))
        parts.append(shown)
    for target in judge(result):
        if target["verdict"] != "not measured":
            parts.append(Text(f"{target['verdict']}: {target['rule']} ({target['measured']})"))
    return Group(*parts)


def page(result: Result, target: str | Path, source: str, plots: str | Path | None = None) -> Path:
    """Write the Markdown page, and its plots into `plots`, a folder beside or below it."""
    target = Path(target)
    folder = Path(plots) if plots is not None else target.parent / "img"
    folder.mkdir(parents=True, exist_ok=True)
    where = Path(os.path.relpath(folder, target.parent)).as_posix()
    drawn = {"": throughput_svg(result), "-roofline": roofline(result)}
    for name, text in drawn.items():
        write_text(folder / f"{target.stem}{name}.svg", text)
    write_text(target, markdown(result, source, f"{where}/{target.stem}"))
    return target


def markdown(result: Result, source: str, images: str = "img/bench-kernels") -> str:
    """The page as Markdown, its pictures being `images` + .svg and `images` + -roofline.svg; the
    same result gives the same text.
    """
    lines = [
        "# Attention kernels, masks and lengths",
        "",
        f"Generated from `{source}`; nothing here is typed. Throughput counts the pairs a mask "
        "allows, never the whole square, so masks compare; backward counts 2.5 times forward. "
        "Timed in turns, medians of a shared machine: compare within a table, not across "
        "machines, and never read the order of CPU kernels as that of GPU kernels.",
        "",
        *_machine(result),
        "",
        "## Targets, stated before the run",
        "",
        *_md([["verdict", "rule", "measured"],
              *([t["verdict"], t["rule"], t["measured"]] for t in judge(result))]),
        "",
        *_reach(result),
        f"![Throughput against length, one panel a mask]({images}.svg)",
        "",
        f"![Roofline of the machine]({images}-roofline.svg)",
        "",
    ]  # fmt: skip
    for title, grid in grids(result):
        lines += [f"## {title[0].upper()}{title[1:]}", "", *_md(grid, right=True), ""]
    lines += ["`kept` is the share of all pairs that the mask allows; – is unsupported.", ""]
    lines += ["## Who can do what", "", "Forward / backward, where they differ.", ""]
    lines += [*_md(support(result)), ""]
    if absent(result):
        lines += ["## Not there, or not for this device", "", "| kernel | why |", "| --- | --- |"]
        lines += [f"| {_cell(n)} | {_cell(r)} |" for n, r in absent(result)] + [""]
    if failures(result):
        lines += ["## What was not measured, and why", ""]
        lines += [f"- {_cell(r)} ({_cell(_some(w))})" for r, w in failures(result)] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _reach(result: Result) -> list[str]:
    total, grid = within_reach(result)
    title = reach_title(total)
    return [f"### {title}", "", REACH, "", *_md(grid, right=True), ""] if grid else []


def html(result: Result) -> str:
    """The same as one HTML file that opens offline."""
    body = ["<h1>Attention kernels, masks and lengths</h1>"]
    body += [f"<p>{escape(line)}</p>" for line in _machine(result) if line]
    targets = [[t["verdict"], t["rule"], t["measured"]] for t in judge(result)]
    body += ["<h2>Targets, stated before the run</h2>",
             table_html([["verdict", "rule", "measured"], *targets])]  # fmt: skip
    total, grid = within_reach(result)
    if grid:
        body += [
            f"<h3>{escape(reach_title(total))}</h3>",
            f"<p>{escape(REACH)}</p>",
            table_html(grid),
        ]
    body += [throughput_svg(result), roofline(result)]
    for title, grid in grids(result):
        body += [f"<h2>{escape(title[0].upper() + title[1:])}</h2>", table_html(grid)]
    body += ["<h2>Who can do what</h2>", table_html(support(result))]
    if absent(result):
        body += ["<h2>Not there, or not for this device</h2>",
                 table_html([["kernel", "why"], *map(list, absent(result))])]  # fmt: skip
    if failures(result):
        rows = [[r, _some(w)] for r, w in failures(result)]
        body += ["<h2>What was not measured, and why</h2>", table_html([["why", "where"], *rows])]
    return document("Attention kernels", body)


def document(title: str, body: Sequence[str]) -> str:
    """A self-contained page: no script, no request."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; img-src data:\">",
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


_STYLE = """
:root { color-scheme: light dark; --edge: #8885; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.8rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.wide { overflow-x: auto; } .whole td { white-space: nowrap; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--edge); text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; display: block; margin: 1.2rem 0; border-radius: 6px; }
.masks { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.4rem; }
.masks svg { width: 100%; margin: .4rem 0; } .masks h2 { margin: 0; overflow-wrap: anywhere; }
.masks p { margin: .2rem 0; font-size: .86rem; }
"""


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
        lines += [
            "",
            f"Ceilings measured at the start of the run: {top.values['flops'] / 1e9:.0f} GFLOP/s "
            f"(matrix product), {top.values['bandwidth'] / 1e9:.1f} GB/s (copy).",
        ]
    return lines


# -- plots ---- ----------------------------------------------------------------------------------
def _plotted(result: Result) -> list[Cell]:
    """Cells of the forward; what is wrong is in the tables alone, as its speed says nothing."""
    return [c for c in cells(result)
            if c.ok and c.values["exact"] and not c.settings["backward"]]  # fmt: skip


def _drawn(result: Result) -> tuple[list[tuple[str, str]], int]:
    """(kernel, color) of those that are drawn, and how many others are in the tables alone."""
    there = dict.fromkeys(c.settings["kernel"] for c in _plotted(result))
    own = [n for n in there if n.partition(":")[0].endswith(".py")]
    drawn = list(zip([n for n in DRAWN if n in there] + own, COLORS))
    return drawn, len(present(result)) - len(drawn)


def throughput_svg(result: Result) -> str:
    """Throughput of the forward against length, one panel a mask."""
    lengths = values(result, "tokens")
    masks = [m for m in values(result, "mask") if ":" not in m] or values(result, "mask")
    (drawn, others), columns, w, h = _drawn(result), 4, 262, 190
    top = max([c.values["throughput"] for c in _plotted(result)], default=1.0) * 1.08
    names, more = _legend(drawn, others, columns * w)
    height = 60 + more + h * math.ceil(len(masks) / columns)
    out = svg(columns * w + 16, height, "Throughput against length, one panel a mask") + names
    unit, size = ("TFLOP/s", 1e12) if top >= 1e13 else ("GFLOP/s", 1e9)
    out.append(f'<text x="46" y="{44 + more}" fill="#666">{unit} of allowed pairs, forward</text>')
    for n, mask in enumerate(masks):
        x0, y0 = 46 + n % columns * w, 74 + more + n // columns * h
        inner, tall = w - 50, h - 62
        out.append(f'<text x="{x0}" y="{y0 - 10}" font-weight="600">{escape(mask)}</text>')
        for part in (0.0, 0.5, 1.0):
            y = y0 + tall * (1 - part)
            out.append(f'<path d="M{x0} {y:.1f}h{inner}" stroke="#ddd"/>')
            out.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" fill="#666" text-anchor="end">'
                       f"{_tick(top * part / size)}</text>")  # fmt: skip
        at = {t: x0 + inner * (i + 0.5) / len(lengths) for i, t in enumerate(lengths)}
        for t, x in at.items():
            out.append(f'<text x="{x:.1f}" y="{y0 + tall + 16}" fill="#666" text-anchor="middle">'
                       f"{k(t)}</text>")  # fmt: skip
        for name, color in drawn:
            points = []
            for t in lengths:
                cell = result.get(key_of(name, mask, t, False))
                if cell and cell.values["exact"]:
                    points.append((at[t], y0 + tall * (1 - cell.values["throughput"] / top)))
            out += _line(points, color)
    return "\n".join([*out, "</svg>", ""])


def roofline(result: Result) -> str:
    """Throughput over intensity (FLOPs by bytes of q, k, v and out) under the roofs."""
    machine = result.cells.get("machine")
    drawn, others = _drawn(result)
    names, more = _legend(drawn, others, 750)
    out = svg(760, 400 + more, "Roofline: throughput over arithmetic intensity, forward") + names
    s, points = result.settings, list[tuple[float, float, str, str]]()
    width = {"float64": 8, "float32": 4}.get(s["dtype"], 2)
    for cell in _plotted(result):
        name = cell.settings["kernel"]
        color = dict(drawn).get(name)
        if color:
            once = cell.settings["tokens"] * s["dim"] * width
            intensity = cell.values["flops"] / (2 * once * (s["heads"] + s["kv_heads"]))
            label = f"{name}, {cell.settings['mask']}, {k(cell.settings['tokens'])}"
            points.append((intensity, cell.values["throughput"], color, label))
    if machine is None or not points:
        return "\n".join([*out, '<text x="60" y="90">nothing was measured</text></svg>', ""])
    flops, band = machine.values["flops"], machine.values["bandwidth"]
    xs, ys = [p[0] for p in points] + [flops / band], [p[1] for p in points] + [flops]
    x0, x1 = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    y0, y1 = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            70 + 660 * (math.log10(x) - x0) / max(x1 - x0, 1),
            340 + more - 280 * (math.log10(y) - y0) / max(y1 - y0, 1),
        )

    for power in range(x0, x1 + 1):
        x, y = at(10.0**power, 10.0**y0)
        out.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" fill="#666" text-anchor="middle">'
                   f"{10.0**power:g}</text>")  # fmt: skip
    for power in range(y0, y1 + 1):
        x, y = at(10.0**x0, 10.0**power)
        out.append(f'<path d="M70 {y:.1f}h660" stroke="#ddd"/>')
        out.append(f'<text x="64" y="{y + 4:.1f}" fill="#666" text-anchor="end">'
                   f"{10.0**power / 1e9:g}</text>")  # fmt: skip
    left = max(10.0**x0, 10.0**y0 / band)
    roof = [at(left, left * band), at(flops / band, flops), at(10.0**x1, flops)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in roof)
    out.append(f'<path d="M{path}" fill="none" stroke="#222" stroke-dasharray="6 4"/>')
    for x, y, color, label in points:
        a, b = at(x, y)
        out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.4" fill="{color}" fill-opacity=".75">'
                   f"<title>{escape(label)}</title></circle>")  # fmt: skip
    said = "FLOP by byte of q, k, v and out; upwards: GFLOP/s; dashed: the machine's ceilings"
    out.append(f'<text x="400" y="{386 + more}" fill="#666" text-anchor="middle">{said}</text>')
    return "\n".join([*out, "</svg>", ""])


def svg(width: float, height: float, title: str) -> list[str]:
    """The first lines of a drawing on white."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>',
    ]


def _legend(drawn: list[tuple[str, str]], others: int, width: float) -> tuple[list[str], int]:
    """Kernels by color, and the height of the lines after the first that `width` asks for."""
    out, x, y = list[str](), 46.0, 24
    for name, color in [*drawn, *([(f"{others} more in the tables", "none")] if others else [])]:
        if x > 46 and x + 10 + 7.2 * len(name) > width:
            x, y = 46.0, y + 18
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{color}"/>')
        out.append(f'<text x="{x + 10}" y="{y}">{escape(name)}</text>')
        x += 34 + 7.2 * len(name)
    return out, y - 24


def _tick(value: float) -> str:
    """A figure of an axis: whole from 10 on, else its two leading digits.

    >>> _tick(1234.5), _tick(0.537), _tick(0.0)
    ('1234', '0.54', '0')
    """
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _line(points: list[tuple[float, float]], color: str) -> list[str]:
    if not points:
        return []
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return [f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>', *dots]


# -- small things --------------------------------------------------------------------------------
def _some(where: list[str]) -> str:
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    return ", ".join(where[:3]) + more


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _md(grid: Grid, right: bool = False) -> list[str]:
    rule = ["---", *(["---:" if right else "---"] * (len(grid[0]) - 1))]
    return ["| " + " | ".join(_cell(c) or " " for c in line) + " |" for line in
            [grid[0], rule, *grid[1:]]]  # fmt: skip


def table_html(grid: Grid, fold: bool = True) -> str:
    """A table whose first row is its head, scrolled where it is too wide; cells fold or not."""
    head = "".join(f"<th>{escape(c)}</th>" for c in grid[0])
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in line) + "</tr>" for line in grid[1:]
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="{"wide" if fold else "wide whole"}"><table>{inner}</table></div>'


def main() -> None:
    """Regenerate docs/bench-kernels*.md from benchmarks/results/kernels*.json."""
    from .record import load

    for source in sorted(Path("benchmarks/results").glob("kernels*.json")):
        page(load(source), f"docs/bench-{source.stem}.md", source.as_posix())


if __name__ == "__main__":
    main()
