"""One page of blocks: offline, escaped, the same words in all renderings."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from regard.report.chart import Chart, Line, Panel
from regard.report.contact import figure
from regard.report.contact import page as contact_page
from regard.report.document import (
    Code,
    Html,
    Items,
    Page,
    Pairs,
    Picture,
    Row,
    Section,
    inline,
    show,
)
from regard.report.table import Cell, Table

EVIL = "</title><script>alert(1)</script><img src=x>"
CHART = Chart([Panel("x", "y", [Line("a", [(0, 0), (1, 2)])])], "a line", file="img/a.svg")


def whole(evil: str = "") -> Page:
    blocks = [
        Table(["name"], [[f"cell{evil}"]]),
        CHART,
        Items([f"item{evil}", "another"]),
        Pairs([("device", f"cpu{evil}")]),
        Code(f"regard see{evil}"),
        Section(f"Inner{evil}", ["`code` inside"], f"its lead{evil}"),
    ]
    sections = [Section(f"Outer section{evil}", blocks, name=f"Outer{evil}")]
    return Page(f"Title{evil}", sections, [f"Intro{evil}."], under=[f"fact{evil}"],
                facts=[(f"3{evil}", f"words{evil}")], source="x.json")  # fmt: skip


def test_markdown_has_every_block_in_order() -> None:
    assert whole().markdown() == (
        "# Title\n\n<!-- Generated from x.json; do not edit. -->\n\nIntro.\n\n"
        "## Outer section\n\n| name |\n| --- |\n| cell |\n\n![a line](img/a.svg)\n\n"
        "- item\n- another\n\n- device: cpu\n\n```\nregard see\n```\n\n"
        "### Inner\n\nits lead\n\n`code` inside\n"
    )


def test_a_page_without_plots_has_no_script_and_asks_for_nothing() -> None:
    text = whole().html()
    assert "<script" not in text and "script-src" not in text and "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert '<a href="#outer-section">Outer</a>' in text and '<section id="outer-section"' in text
    assert "<h3" in text and "<code>code</code> inside" in text and "prefers-color-scheme" in text
    assert text == whole().html()


def test_what_others_wrote_is_escaped_everywhere() -> None:
    text = whole(EVIL).html()
    assert "<script" not in text and "<img" not in text and text.count("</title>") == 2  # and SVG
    assert "<script" not in re.sub(r"```.*?```", "", whole(EVIL).markdown(), flags=re.S)


@pytest.mark.parametrize("width", [20, 80])
def test_a_terminal_gets_the_same_words(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(whole("\x1b[2J"))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and "\x1b" not in text and "svg" not in text
    places = [text.index(w) for w in ("Title", "Intro", "Outer", "cell", "- item", "cpu", "Inner")]
    assert places == sorted(places)


def test_a_section_of_figures_alone_is_left_out_of_a_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(Section("Plots", [CHART]))
    show(CHART, Cell("bold words", "bold"), Html("<p>"), "more", console=console)
    assert console.export_text() == "bold words\n\nmore\n"


def test_pictures_travel_inside() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4), "red")
    text = contact_page(EVIL, [EVIL], {EVIL: [figure(image, EVIL, 64)]})
    assert text.count('<img src="data:image/png;base64,') == 1 and "width:64px" in text
    assert "<script" not in text and "img-src data:" in text
    assert Page("t", [Section("s", [Row([Picture(image, "c")])])]).markdown() == "# t\n\n## s\n"


def test_marks_of_words_are_not_taken_from_products() -> None:
    assert inline("2 * 3 * 4") == "2 * 3 * 4"
    assert inline("a_b `x*y*z`") == "a_b <code>x*y*z</code>"
