"""One table, three renderings: nothing runs over, breaks a word, or escapes."""

from __future__ import annotations

import html
import io
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from regard.report.table import Cell, Column, Table, clean, from_grid, right

WIDTHS = st.integers(4, 100)
TEXT = st.text(max_size=30) | st.text("ab –.", max_size=60) | st.sampled_from(
    ["\x1b[31mred", "[red]", "a|b", "<script>", "漢字 漢字", "\r\n", "\x9b2J", "\u202eabc", "-"]
)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> Table:
    columns = draw(
        st.lists(
            st.builds(
                Column,
                TEXT,
                align=st.sampled_from(["left", "right"]),
                shrink=st.sampled_from(["wrap", "cut"]),
                spare=st.booleans(),
            ),
            min_size=1,
            max_size=5,
        )
    )
    row = st.tuples(*[TEXT | st.builds(Cell, TEXT, st.sampled_from(["", "bold"]))] * len(columns))
    rows = draw(st.lists(row, max_size=4))
    return Table(columns, rows, draw(TEXT), draw(TEXT), draw(st.integers(0, 2)))


@settings(deadline=None, max_examples=80)
@given(tables(), WIDTHS)
def test_a_terminal_gets_no_long_line_no_broken_word_no_control(table: Table, width: int) -> None:
    text = table.text(width)
    lines = text.split("\n")
    assert max(map(cell_len, lines)) <= width
    assert all(c == "\n" or c.isprintable() or c in "\u00a0\u202f" for c in text)
    texts = [table.title, table.note, *(str(cell) for row in table.rows for cell in row)]
    texts += [c.name if isinstance(c, Column) else c for c in table.columns]
    texts.append("Left out at this width:")
    words = {w for t in texts for w in re.split("[ :,.]", clean(t))} | {""}
    for word in re.split(r"[ \n:,.]", text):
        whole = word in words or set(word) <= {"─", "–"}
        cut = word.endswith("…") and any(w.startswith(word[:-1]) for w in words)
        assert whole or cut, f"{word!r} is no word of the table"


@settings(deadline=None, max_examples=30)
@given(tables(), WIDTHS)
def test_a_console_prints_the_same(table: Table, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    shown, text = (
        "\n".join(line.rstrip() for line in lines.split("\n")).rstrip("\n")
        for lines in (plain, table.text(width))
    )
    assert shown == text


@settings(deadline=None, max_examples=30)
@given(tables())
def test_pages_keep_every_cell_and_its_place(table: Table) -> None:
    plain = Table(table.columns, table.rows)
    page = plain.html()
    cells = re.findall(r"<td(?: class=\"n\")?>(.*?)</td>", page, re.S)
    texts = [str(c) for row in table.rows for c in row]
    assert [html.unescape(re.sub("</?strong>", "", c)) for c in cells] == texts
    assert not re.search(r"<(?!/?(div|table|thead|tbody|tr|th|td|strong)\b)", page)
    lines = plain.markdown().splitlines()
    assert len(lines) == 2 + len(table.rows)
    for line in lines:
        unescaped = re.sub(r"\\.", "", line)
        assert unescaped.count("|") == len(table.columns) + 1 and not re.search(
            "<[a-z/!?]", line, re.I
        )


ROWS: list[list[Any]] = [
    ["cross-attention-explanation", "measure how much of a model its attention explains", 1.5],
    ["act", "shrink the harmful sinks of chosen heads", None],
]


def test_one_block_a_row_where_columns_do_not_fit() -> None:
    table = Table(["method", "what it does", right("times", "{:.1f}".format)], ROWS)
    assert table.text(80).splitlines()[:3] == [
        "method                       what it does                                  times",
        "───────────────────────────  ────────────────────────────────────────────  ─────",
        "cross-attention-explanation  measure how much of a model its attention       1.5",
    ]
    assert table.text(30).splitlines() == [
        "cross-attention-explanation",
        "  what it does:",
        "    measure how much of a",
        "    model its attention",
        "    explains",
        "  times: 1.5",
        "",
        "act",
        "  what it does:",
        "    shrink the harmful sinks",
        "    of chosen heads",
        "  times: –",
    ]
    assert table.text(20).startswith("cross-attention-exp…\n")


def test_keys_are_repeated_where_columns_are_many() -> None:
    names = [f"kernel-{n}" for n in range(6)]
    table = from_grid([["mask", *names], ["causal", *"123456"], ["full", *"654321"]], keys=1)
    lines = table.text(30).splitlines()
    assert lines[0] == "mask    kernel-0  kernel-1"
    assert lines[2] == "causal         1         2"
    assert [line for line in lines if line.startswith("mask")] == [
        "mask    kernel-0  kernel-1",
        "mask    kernel-2  kernel-3",
        "mask    kernel-4  kernel-5",
    ]
    assert table.text(200).count("mask") == 1
    assert table.text(12).splitlines()[:2] == ["causal", "  kernel-0:"]


def test_spare_columns_are_left_out_and_named() -> None:
    columns = ["method", Column("verb", spare=True), Column("paper", spare=True)]
    table = Table(columns, [["task-kv", "shrink", "He et al."]])
    assert table.text(30).splitlines()[0] == "method   verb    paper"
    assert table.text(18).splitlines() == [
        "method   verb",
        "───────  ──────",
        "task-kv  shrink",
        "",
        "Left out at this",
        "width: paper.",
    ]
    assert table.text(8).splitlines()[0] == "method" and table.text(6).startswith("task-…\n")
    assert "He et al." in table.markdown() and "He et al." in table.html()


def test_cells_can_lead_somewhere_and_stand_out() -> None:
    table = Table(["a", "b"], [[Cell("x|y", url="https://e.org/?a=1&b=2"), Cell("z", "bold")]])
    assert table.markdown().splitlines()[-1] == "| [x\\|y](https://e.org/?a=1&b=2) | **z** |"
    assert '<a href="https://e.org/?a=1&amp;b=2">x|y</a>' in table.html()
    assert "<strong>z</strong>" in table.html() and str(table).splitlines()[-1] == "x|y  z"


def test_a_cut_column_stays_on_one_line() -> None:
    column = Column("text", shrink="cut")
    shown = Table([column, "n"], [["many words that go on", "1"]]).text(20)
    assert shown.splitlines()[-1] == "many words that…   1"


@pytest.mark.parametrize("width", [80, 20])
def test_without_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    Console(file=out).print(Table(["method", "what it does"], [row[:2] for row in ROWS]))
    assert max(map(len, out.getvalue().splitlines())) <= width and "\x1b" not in out.getvalue()


def test_what_is_no_table() -> None:
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table(["a"], [["b", "c"]])
    with pytest.raises(ValueError, match="needs columns"):
        Table([], [])
    with pytest.raises(ValueError, match="align is left or right"):
        Column("a", "middle")
