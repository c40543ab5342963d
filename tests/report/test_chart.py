"""The chart draws what it is given where it belongs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("PIL")

from regard.report.chart import COLORS, HEAD, INSET, PANEL, Line, Panel, chart, ticks


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[n : n + 2], 16) for n in (1, 3, 5))


def test_points_lie_where_they_should() -> None:
    low, high = Line("low", [(0, 0), (10, 0)]), Line("high", [(10, 5)], ["top"], corners=4)
    panel = Panel("x", "y", [low, high])
    picture = chart([panel, panel])
    assert picture.size == (2 * PANEL[0], HEAD + PANEL[1])
    wide = PANEL[0] - INSET[0] - INSET[2]
    tall = PANEL[1] - INSET[1] - INSET[3]
    west, south = INSET[0] + wide * 0.08 / 1.16, HEAD + PANEL[1] - INSET[3] - tall * 0.08 / 1.16
    east, north = west + wide / 1.16, south - tall / 1.16
    for left in (0, PANEL[0]):
        for x, y, color in ((west, south, 0), (east, south, 0), (east, north, 1)):
            assert picture.getpixel((round(left + x), round(y))) == rgb(COLORS[color])
        between = picture.getpixel((round(left + (west + east) / 2), round(south)))
        assert between == pytest.approx(rgb(COLORS[0]), abs=8), "the points are joined"
        assert picture.getpixel((round(left + west) + 20, round(north) + 20)) == (255, 255, 255)
    assert picture.getpixel((INSET[0] + 12, HEAD // 2)) == rgb(COLORS[0]), "the legend's mark"


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
        ([], "same lines"),
        ([Panel("x", "y", [])], "every line points"),
        ([Panel("x", "y", [Line("a", [])])], "every line points"),
        ([Panel("x", "y", [Line("a", [(0, 0)], ["p", "q"])])], "one label a point"),
        ([Panel("x", "y", [Line(w, [(0, 0)])]) for w in "ab"], "same lines"),
        ([Panel("x", "y", [Line(w, [(0, 0)]) for w in "abcdef"])], "leave some out"),
    ],
)
def test_what_cannot_be_drawn(panels: list[Panel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chart(panels)
