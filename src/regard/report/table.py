"""One table of plain data: the same rows for a terminal, as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 80  # letters of a line where no terminal says otherwise
GAP = 2  # letters between columns
LEAST = 16  # letters that a column of words keeps while others have more
EASE = 28  # the same before spare columns are shown

Line = list[tuple[str, str]]  # pieces of a line with the style of each


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text.

    Attributes:
        text: what it says.
        style: "bold" or "code" everywhere; colours and "dim" on a terminal only.
        url: where it leads, on pages.
    """

    text: str
    style: str = ""
    url: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Column:
    """How one column is shown.

    Attributes:
        name: its head.
        align: "left" or "right"; the cells of a right column are figures, which never wrap.
        format: turns a value into its text; `str` if None. A value of None is shown as "–".
        shrink: on a narrow terminal words "wrap", or a cell is "cut" with …
        spare: left out of a terminal that is too narrow for all columns; a last line says so.
    """

    name: str = ""
    align: str = "left"
    format: Callable[[Any], str] | None = None
    shrink: str = "wrap"
    spare: bool = False

    def __post_init__(self) -> None:
        if self.align not in ("left", "right") or self.shrink not in ("wrap", "cut"):
            raise ValueError(
                f"column {self.name!r}: align is left or right, shrink is wrap or cut, not "
                f"{self.align!r} and {self.shrink!r}"
            )

    def cell(self, value: Any) -> Cell:
        """A value as what is shown."""
        if isinstance(value, Cell):
            return value
        return Cell("–" if value is None else self.format(value) if self.format else str(value))


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    A terminal that is too narrow for all columns does without the spare ones; or gets the first
    `keys` columns with as many others as fit, part after part; or, with no keys, one block a row.
    No word is broken: one that is wider than the terminal ends in "…".

    Attributes:
        columns: a name is a column of words.
        rows: plain values or `Cell`, as many as columns.
        title, note: a line above and a line below.

    >>> table = Table(["kernel", right("ms", "{:.1f}".format)], [["flex", 1.26], ["sdpa", None]])
    >>> print(table)
    kernel   ms
    ──────  ───
    flex    1.3
    sdpa      –
    >>> print(table.markdown())
    | kernel | ms |
    | --- | ---: |
    | flex | 1.3 |
    | sdpa | – |
    >>> print(Table(["method", "what it does"], [["act", "shrink harmful sinks"]]).text(16))
    act
      what it does:
        shrink
        harmful
        sinks

    Raises:
        ValueError: a row that has not one cell a column.
    """

    columns: Sequence[Any]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    keys: int = 0

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("a table needs columns")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells for {len(self.columns)} columns")

    @property
    def _columns(self) -> list[Column]:
        return [Column(c) if isinstance(c, str) else c for c in self.columns]

    @property
    def _cells(self) -> list[list[Cell]]:
        return [[c.cell(v) for c, v in zip(self._columns, row)] for row in self.rows]

    # -- pages ---------------------------------------------------------------------------------
    def markdown(self) -> str:
        """The rows as a Markdown table. Inline Markdown of a cell is left as it is."""
        ends = [" --- |" if c.align == "left" else " ---: |" for c in self._columns]
        lines = ["| " + " | ".join(_piped(c.name) for c in self._columns) + " |"]
        lines.append("|" + "".join(ends))
        for row in self._cells:
            lines.append("| " + " | ".join(_markdown_cell(c) for c in row) + " |")
        parts = [f"**{markdown(self.title)}**"] if self.title else []
        return "\n\n".join(
            [*parts, "\n".join(lines), *([markdown(self.note)] if self.note else [])]
        )

    def html(self) -> str:
        """The rows as an HTML table that scrolls where it is too wide; all text is escaped."""
        aligned = ["" if c.align == "left" else ' class="n"' for c in self._columns]
        heads = "".join(
            f"<th{a} scope='col'>{escape(c.name)}</th>" for a, c in zip(aligned, self._columns)
        )
        rows = "".join(
            "<tr>" + "".join(f"<td{a}>{_html_cell(c)}</td>" for a, c in zip(aligned, row)) + "</tr>"
            for row in self._cells
        )
        head = f"<thead><tr>{heads}</tr></thead>" if any(c.name for c in self._columns) else ""
        label = f" role='region' aria-label='{escape(self.title)}'" if self.title else ""
        return (
            (f"<h3>{escape(self.title)}</h3>" if self.title else "")
            + f"<div class='scroll' tabindex='0'{label}><table>{head}<tbody>{rows}</tbody></table>"
            + "</div>"
            + (f"<p class='help'>{escape(self.note)}</p>" if self.note else "")
        )

    # -- terminals -----------------------------------------------------------------------------
    def text(self, width: int = WIDTH) -> str:
        """The table for a terminal of so many letters, without colours."""
        return "\n".join("".join(t for t, _ in line).rstrip(" ") for line in self.lines(width))

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for line in self.lines(options.max_width):
            text = Text.assemble(*line, no_wrap=True)
            text.rstrip()
            yield text

    def lines(self, width: int) -> Iterator[Line]:
        """The lines of the table on a terminal of so many letters, each as its pieces."""
        if self.title:
            yield from ([(line, "bold")] for line in wrap(clean(self.title), width))
        rows = [[(clean(c.text), c.style) for c in row] for row in self._cells]
        parts = self._parts(rows, width)
        if not parts:
            yield from self._blocks(rows, width)
        for n, part in enumerate(parts):
            if n:
                yield []
            yield from self._grid(rows, *part)
        if parts and (left := set(range(len(self.columns))).difference(*(c for c, _ in parts))):
            names = ", ".join(clean(self._columns[n].name) for n in sorted(left))
            words = f"Left out at this width: {names}."
            yield from ([], *([(line, "dim")] for line in wrap(words, width)))
        if self.note:
            yield from ([(line, "dim")] for line in wrap(clean(self.note), width))

    def _parts(self, rows: Sequence[Line], width: int) -> list[tuple[list[int], list[int]]]:
        """(columns, their widths) of every part; none where only blocks fit."""
        columns = self._columns
        natural, least = [], []
        for n, column in enumerate(columns):
            texts = [row[n][0] for row in rows]
            head = clean(column.name)
            full = max(map(size, (*texts, head)), default=0)
            word = max((size(w) for t in (*texts, head) for w in t.split(" ")), default=0)
            if column.align == "right":
                floor = max(max(map(size, texts), default=0), longest(head))
            elif column.shrink == "cut":
                floor = max(longest(head), min(full, LEAST))
            else:
                floor = max(word, min(full, LEAST))
            natural.append(full)
            least.append(floor)

        def room(chosen: Sequence[int]) -> int:
            return width - sum(least[n] for n in chosen) - GAP * (len(chosen) - 1)

        everything = list(range(len(columns)))
        parts = [everything]
        tight = [max(0, min(full, EASE) - floor) for full, floor in zip(natural, least)]
        for n in reversed([n for n in everything if columns[n].spare]):
            if room(parts[0]) < sum(tight[other] for other in parts[0]):
                parts[0] = [other for other in parts[0] if other != n]
        if not parts[0] or room(parts[0]) < 0:
            if not 0 < self.keys < len(columns):
                return []
            keys, parts = everything[: self.keys], []
            for n in everything[self.keys :]:
                if room([*keys, n]) < 0:
                    return []
                if parts and room([*parts[-1], n]) >= 0:
                    parts[-1].append(n)
                else:
                    parts.append([*keys, n])
        return [(chosen, _spread(chosen, natural, least, room(chosen))) for chosen in parts]

    def _grid(
        self, rows: Sequence[Line], chosen: Sequence[int], widths: Sequence[int]
    ) -> Iterator[Line]:
        columns = [self._columns[n] for n in chosen]

        def lines_of(cells: Line, head: bool = False) -> list[Line]:
            folded = []
            for column, (text, style), width in zip(columns, cells, widths):
                cut = column.shrink == "cut" and not head
                pieces = [shorten(text, width)] if cut else wrap(text, width)
                sides = ("", " ") if column.align == "left" else (" ", "")
                pad = [tuple(side * (width - size(p)) for side in sides) for p in pieces]
                folded.append([(a + p + b, style) for p, (a, b) in zip(pieces, pad)])
            lines = []
            for at in range(max(1, *map(len, folded))):
                line: Line = []
                for side, width in zip(folded, widths):
                    line += [(" " * GAP, "")] if line else []
                    line.append(side[at] if at < len(side) else (" " * width, ""))
                lines.append(line)
            return lines

        if any(c.name for c in columns):
            yield from lines_of([(clean(c.name), "bold") for c in columns], head=True)
            yield [((" " * GAP).join("─" * width for width in widths), "dim")]
        shown = [lines_of([row[n] for n in chosen]) for row in rows]
        apart = any(len(lines) > 1 for lines in shown)
        for n, lines in enumerate(shown):
            if n and apart:
                yield []
            yield from lines

    def _blocks(self, rows: Sequence[Line], width: int) -> Iterator[Line]:
        names = [clean(c.name) for c in self._columns]
        outer, inner = ("  ", "    ") if width > 10 else ("", "")
        for n, row in enumerate(rows):
            if n:
                yield []
            yield from ([(line, "bold")] for line in wrap(row[0][0] or "–", width))
            for name, (text, style) in zip(names[1:], row[1:]):
                if not text:
                    continue
                label = f"{name}: " if name else ""
                if size(outer + label + text) <= width:
                    yield [(outer + label, "dim"), (text, style)]
                    continue
                if label:
                    yield from (
                        [(outer + part, "dim")] for part in wrap(label.rstrip(), width - len(outer))
                    )
                yield from ([(inner + part, style)] for part in wrap(text, width - len(inner)))


def right(name: str, format: Callable[[Any], str] | None = None) -> Column:
    """A column of figures."""
    return Column(name, "right", format)


def from_grid(rows: Sequence[Sequence[Any]], *, words: Sequence[int] = (0,), **more: Any) -> Table:
    """A table whose first row is its head, of figures but in the columns `words`."""
    head = [Column(str(name)) if n in words else right(str(name)) for n, name in enumerate(rows[0])]
    return Table(head, rows[1:], **more)


def _spread(
    chosen: Sequence[int], natural: Sequence[int], least: Sequence[int], room: int
) -> list[int]:
    """The widths of some columns: letter by letter to that which would have the most lines."""
    widths = {n: least[n] for n in chosen}
    for _ in range(room):
        short = [n for n in chosen if widths[n] < natural[n]]
        if not short:
            break
        widths[max(short, key=lambda n: natural[n] / max(widths[n], 1))] += 1
    return [widths[n] for n in chosen]


# -- text ------------------------------------------------------------------------------------------
def clean(text: Any) -> str:
    """Text for one line of a terminal: blanks are one space, and no control character is left.

    >>> clean(" a\\n b\\x1b[31m")
    'a b�[31m'
    """
    flat = re.sub(r"[^\S\u00a0\u202f]+", " ", str(text)).strip(" ")
    return "".join(c if c.isprintable() or c in "\u00a0\u202f" else "�" for c in flat)


def size(text: str) -> int:
    """Letters that a text takes on a terminal: a wide one counts as two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def longest(text: str) -> int:
    """Letters of the longest word."""
    return max(map(size, text.split(" ")))


def shorten(text: str, width: int) -> str:
    """
    >>> shorten("abcdef", 4), shorten("abc", 4)
    ('abc…', 'abc')
    """
    if size(text) <= width:
        return text
    kept = ""
    for letter in text:
        if size(kept + letter) > width - 1:
            break
        kept += letter
    return kept.rstrip(" ") + "…" if width > 0 else ""


def wrap(text: str, width: int) -> list[str]:
    """Lines of whole words; a word that is wider than a line ends in "…".

    >>> wrap("some long-winded words", 8)
    ['some', 'long-wi…', 'words']
    """
    lines: list[str] = []
    for word in text.split(" "):
        word = shorten(word, width)
        if lines and size(lines[-1]) + 1 + size(word) <= width:
            lines[-1] += " " + word
        elif word:
            lines.append(word)
    return lines


def markdown(text: Any) -> str:
    """Text on one line that is not taken for HTML; other Markdown in it is left as it is.

    >>> markdown("a < b <i> & &amp;")
    'a < b &lt;i> & &amp;amp;'
    """
    flat = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(str(text).split()))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", flat)


def _piped(text: str) -> str:
    """Text that stays within its cell.

    >>> _piped("a|b")
    'a\\\\|b'
    """
    return re.sub(r"(\\*)\|", r"\1\1\\|", markdown(text))


def _markdown_cell(cell: Cell) -> str:
    mark = {"bold": "**", "code": "`"}.get(cell.style, "") if cell.text else ""
    text = f"{mark}{_piped(cell.text)}{mark}"
    return f"[{text}]({cell.url})" if cell.url else text


def _html_cell(cell: Cell) -> str:
    tag = {"bold": "strong", "code": "code"}.get(cell.style)
    text = escape(cell.text)
    text = f"<{tag}>{text}</{tag}>" if tag else text
    return f'<a href="{escape(cell.url)}">{text}</a>' if cell.url else text
