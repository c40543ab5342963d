"""An overview on the terminal: headline facts, sink map, tokens with the highest values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regard.report.look import finite, ordinal, percent, ramp, short, visible
from regard.report.table import Cell, Table, clean
from regard.report.words import cost_rows, headline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Overview = Mapping[str, Any]


def show(overview: Overview, *, console: Console | None = None, top: int = 8) -> None:
    """Print an overview; `top` tokens are listed for each view."""
    if console is None:
        from regard.report.screen import Console

        console = Console()
    console.print(summary(overview, top=top))


def summary(overview: Overview, *, top: int = 8) -> RenderableType:
    """Return an overview as something rich can print; blocks that are missing are left out."""
    from rich.console import Group
    from rich.text import Text

    # Text, never markup: a token such as "[red]" must be shown, not obeyed.
    title = str((overview.get("meta") or {}).get("title") or "Attention report")
    parts: list[RenderableType] = [Text(clean(title), style="bold")]
    facts = [[Cell(big, "bold cyan"), words] for big, words in headline(overview)]
    first = Table(["", ""], facts) if facts else None
    rows = [_row(row) for row in overview.get("rows") or []]
    for part in (first, *rows, _sinks(overview), _tokens(overview, top), _cost(overview)):
        if part is not None:
            parts += [Text(), part]
    return Group(*parts)


def _row(row: Mapping[str, Any]) -> Table:
    names = ["layer", "reads most, mean over heads", "largest share of a head"]
    lines = [[visible(cell) for cell in line] for line in row["layers"]]
    return Table(names, lines, f"What “{visible(str(row['token']))}” looks at", keys=1)


def _sinks(overview: Overview) -> RenderableType | None:
    from rich.text import Text

    sinks = overview.get("sinks") or {}
    rows = sinks.get("alpha") or []
    if not rows or not rows[0]:
        return None
    where = ordinal(int(sinks.get("position") or 0))
    text = Text(f"Share of attention on {where} (down: heads, across: layers)\n", style="dim")
    colors = ramp("dark")
    for head in range(max(len(row) for row in rows)):
        text.append(f"{head:>4} ", style="dim")
        for row in rows:
            value = finite(row[head]) if head < len(row) else None
            level = 0 if value is None else min(int(value * len(colors)), len(colors) - 1)
            # The digit (tenths) keeps the map readable without colour and when piped to a file.
            digit = " " if value is None else str(min(int(value * 10), 9))
            ink = "white" if level < len(colors) // 2 else "black"
            text.append(f"{digit} ", style=f"{ink} on {colors[level]}")
        text.append("\n")
    text.append("     one digit: tenths of the head's attention", style="dim")
    return text


def _tokens(overview: Overview, top: int) -> Table | None:
    tokens = [str(t) for t in overview.get("tokens") or []]
    views = [v for v in (overview.get("views") or {}).values() if v and v.get("values")]
    if not tokens or not views:
        return None
    names, columns = ["rank"], []
    for view in views[:4]:
        unit = str(view.get("unit") or "")
        name = str(view.get("label") or "")
        names.append(f"{name} ({unit})" if unit else name)
        known = [(v, i) for i, v in enumerate(map(finite, view["values"])) if v is not None]
        known = [(v, i) for v, i in known if i < len(tokens)]
        best = sorted(known, key=lambda pair: (-pair[0], pair[1]))[:top]
        columns.append([f"{short(v):,} {visible(tokens[i])[:24]} @{i}" for v, i in best])
    rows = [
        [str(n + 1), *(c[n] if n < len(c) else "" for c in columns)]
        for n in range(max(map(len, columns)))
    ]
    return Table(names, rows, "Highest tokens", keys=1)


def _cost(overview: Overview) -> Table | None:
    meta = overview.get("meta") or {}
    rows = cost_rows(meta) + [("Note", str(note)) for note in meta.get("notes") or []]
    hidden = (overview.get("sinks") or {}).get("hidden") or []
    for h in hidden[:3]:
        share = percent(finite(h.get("alpha")) or 0.0)
        words = f"“{visible(str(h.get('token') or ''))}” at {h.get('position')}: {share}"
        rows.append(("Later sink", f"{words} in {h.get('heads')} heads"))
    return Table(["", ""], [[Cell(name, "dim"), value] for name, value in rows]) if rows else None
