"""The chart draws what it is given where it belongs, as an SVG and as a picture alike."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

pytest.importorskip("PIL")

from regard.report.chart import (
    HEAD,
    INSET,
    PANEL,
    SCALE,
    SIZE,
    Bar,
    Chart,
    Line,
    Panel,
    bars,
    chart,
    ticks,
)
from regard.report.look import SERIES

WEST, SOUTH = INSET[0], HEAD + SIZE[1] - INSET[3]
WIDE, TALL = SIZE[0] - INSET[0] - INSET[2], SIZE[1] - INSET[1] - INSET[3]


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[n : n + 2], 16) for n in (1, 3, 5))


def marks(svg: str) -> list[tuple[float, float, str]]:
    """Where the discs of an SVG are, with their classes; those of the legend left out."""
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3.5" class="(f-c\d)"', svg)
    return [(float(x), float(y), c) for x, y, c in found if float(y) > HEAD]


def test_points_lie_where_they_should() -> None:
    low, high = Line("low", [(0, 0), (10, 0)]), Line("high", [(10, 5)], ["top"], corners=4)
    panel = Panel("x", "y", [low, high])
    picture = chart([panel, panel])
    assert picture.size == (2 * PANEL[0], SCALE * HEAD + PANEL[1])
    west, south = WEST + WIDE * 0.08 / 1.16, SOUTH - TALL * 0.08 / 1.16
    east, north = west + WIDE / 1.16, south - TALL / 1.16
    colors = [rgb(c) for c in SERIES["light"]]
    for left in (0, SIZE[0]):
        for x, y, color in ((west, south, 0), (east, south, 0), (east, north, 1)):
            assert picture.getpixel((round(SCALE * (left + x)), round(SCALE * y))) == colors[color]
        between = picture.getpixel(
            (round(SCALE * (left + (west + east) / 2)), round(SCALE * south))
        )
        assert between == pytest.approx(colors[0], abs=8), "the points are joined"
        blank = (round(SCALE * (left + west)) + 20, round(SCALE * north) + 20)
        assert picture.getpixel(blank) == (255, 255, 255)
    assert picture.getpixel((SCALE * (INSET[0] + 6), SCALE * HEAD // 2)) == colors[0], "the legend"
    drawn = marks(Chart([panel]).svg())
    assert [(x, y) for x, y, _ in drawn] == [
        pytest.approx((west, south), abs=0.1),
        pytest.approx((east, south), abs=0.1),
    ]


def test_logarithmic_axes_have_whole_powers() -> None:
    line = Line("a", [(1024, 2), (4096, 30)], tips=["first", "second"])
    panel = Panel("", "", [line], log_x=2, log_y=10, marks=[(1024, "1k"), (4096, "4k")], unit="x")
    svg = Chart([panel]).svg()
    (x0, y0, _), (x1, y1, _) = marks(svg)
    assert x0 == pytest.approx(WEST + WIDE * 0.08 / 1.16, abs=0.1) and x1 > x0
    assert (SOUTH - y0) / TALL == pytest.approx(0.301 / 2, abs=0.01)  # 1 to 100
    assert (SOUTH - y1) / TALL == pytest.approx(1.477 / 2, abs=0.01)
    for words in ("1k", "4k", "1x", "10x", "100x"):
        assert f">{words}</text>" in svg
    assert "<title>second</title>" in svg


def test_a_name_has_one_colour_in_all_panels() -> None:
    panels = [
        Panel("x", "y", [Line("a", [(0, 0)]), Line("b", [(1, 1)])]),
        Panel("x", "y", [Line("b", [(0, 0), (1, 1)]), Line("none", [])]),
        Panel("x", "y", []),
    ]
    svg = Chart(panels, columns=2).svg()
    assert [c for _, _, c in marks(svg)] == ["f-c0", "f-c1", "f-c1", "f-c1"]
    assert ">none<" not in svg and svg.count("nothing was measured") == 1


def test_words_are_escaped_and_stay_inside() -> None:
    names = [f"<b>a long name of a kernel {n}</b>" for n in range(8)]
    panel = Panel("tokens", "<i>y</i>", [Line(n, [(0, 1), (2, 3)]) for n in names])
    svg = Chart([panel, panel], "<title>", columns=2, size=(262, 190), note="a & b").svg()
    assert "<b>" not in svg and "<i>" not in svg and "a &amp; b" in svg
    ElementTree.fromstring(svg)
    wide, high = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    for x, y, words in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="[^"]*">([^<]*)<', svg):
        shown = words.replace("&lt;", "<").replace("&gt;", ">")
        assert float(x) + 7.2 * len(shown) <= wide and float(y) < high, words


def test_light_and_dark() -> None:
    svg = Chart([Panel("x", "y", [Line("a", [(0, 0), (1, 1)])])]).svg()
    light, _, dark = svg.partition("prefers-color-scheme:dark")
    assert f".f-c0{{fill:{SERIES['light'][0]}}}" in light
    assert f".f-c0{{fill:{SERIES['dark'][0]}}}" in dark and "<script" not in svg


def test_bars_have_their_length_and_their_mark() -> None:
    svg = bars([Bar("a", 10, "10 B", mark=5), Bar("b", 20, "20 B", color=1)], "bytes", "counted")
    assert re.findall(r'width="([\d.]+)" height="16" class="(f-c\d)"', svg) == [
        ("220.0", "f-c0"),
        ("440.0", "f-c1"),
    ]
    assert "M290.0 33.0L290.0 55.0" in svg and ">20 B</text>" in svg and ">counted<" in svg
    assert "nothing was measured" in bars([], "bytes")


def test_a_label_on_top_of_another_is_left_out() -> None:
    def labelled(*words: str) -> Any:
        lines = [Line(str(n), [(0, 0), (1, 1)], ["", w]) for n, w in enumerate(words)]
        return chart([Panel("x", "y", lines)]).tobytes()

    assert labelled("a", "b") == labelled("a", "") != labelled("", "")


def test_ticks_are_round_and_within() -> None:
    assert ticks(-16.1, -2.0) == [-15, -10, -5]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 3.0005) == [3, 3.0001, 3.0002, 3.0003, 3.0004, 3.0005]


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], "needs panels"),
        ([Panel("x", "y", [Line("a", [(0, 0)], ["p", "q"])])], "one label a point"),
        ([Panel("x", "y", [Line(w, [(0, 0)]) for w in "abcdefghi"])], "leave some out"),
    ],
)
def test_what_cannot_be_drawn(panels: list[Panel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chart(panels)
