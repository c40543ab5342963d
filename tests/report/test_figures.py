"""The figures: what each shows, what a hover says, and that user text is escaped in every one."""

from __future__ import annotations

import builtins
import io
import itertools
import json
from typing import Any

import pytest

pytest.importorskip("plotly")

from regard.report import figures, look, terminal

HEADS = {
    "entropy": [[0.0, 1.0, 2.0], [3.0, None, 0.5]],
    "distance": [[1.0, 20.0, 300.0], [4.0, 5.0, 6.0]],
    "layers": [4, 9],
    "local": [[4, 0], [7, 0]],
    "global": [[4, 2]],
}
SINKS = {
    "alpha": [[0.1, 0.2, 0.9], [0.4, 0.5, 0.6]],
    "layers": [4, 9],
    "epsilon": 0.3,
    "position": 0,
}
CAUSAL = [[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.00001, 0.3, 0.69999]]


def rhythm_block(count: int) -> dict[str, Any]:
    return {
        "position": list(range(count)),
        "waad": [float(i % 9) for i in range(count)],
        "fai": [0.001 * (i % 7 + 1) for i in range(count)],
        "window": 10,
        "horizon": [10, 50],
    }


def every_figure(theme: str) -> list[Any]:
    lines = {"position": [0, 1, 2], "mean": [1, 2, 3], "median": [1, 1, 0], "max": [5, 6, 7]}
    thumb = {"layer": 1, "head": 2, "label": "local", "tokens_per_cell": 4, "cells": CAUSAL}
    return [
        figures.sink_map(SINKS, theme=theme),
        figures.entropy_map(HEADS, theme=theme),
        figures.distance_map(HEADS, theme=theme),
        figures.received_by_position(lines, theme=theme),
        figures.rhythm(rhythm_block(60), theme=theme),
        figures.thumbnail(thumb, theme=theme),
        figures.thumbnails([thumb] * 5, theme=theme),
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_is_transparent_and_themed(theme: str) -> None:
    for figure in every_figure(theme):
        shape = json.loads(figure.to_json())
        layout = shape["layout"]["template"]["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
        assert layout["font"]["color"] == look.INKS[theme]["text"]


def test_themes_of_a_figure_differ_only_by_colors_the_page_can_swap() -> None:
    for light, dark in zip(every_figure("light"), every_figure("dark"), strict=True):
        light.layout.template = dark.layout.template = None
        text = light.to_json()
        for name, ink in look.INKS["light"].items():
            text = text.replace(ink, look.INKS["dark"][name])
        assert text == dark.to_json()


def test_layers_run_across_and_keep_their_numbers() -> None:
    trace = figures.sink_map(SINKS).data[0]
    assert trace.x == ("4", "9") and trace.y == ("0", "1", "2")
    assert [list(row) for row in trace.z] == [[0.1, 0.4], [0.2, 0.5], [0.9, 0.6]]
    assert "Layer %{x}, head %{y}" in trace.hovertemplate
    assert "the first token" in trace.hovertemplate
    assert "token 7" in figures.sink_map({**SINKS, "position": 7}).data[0].hovertemplate


def test_a_gap_stays_a_gap() -> None:
    trace = figures.entropy_map(HEADS).data[0]
    assert trace.z[1][1] is None and trace.customdata[1][1] is None
    assert trace.customdata[0][0] == 1  # no entropy: as spread out as one token


def test_marked_heads_outside_the_layers_are_not_drawn() -> None:
    local, far = figures.distance_map(HEADS).data[1:]
    assert (local.name, local.x, local.y) == ("local", ("4",), ("0",))
    assert (far.name, far.x, far.y) == ("global", ("4",), ("2",))


def test_a_log_axis_leaves_zeros_open() -> None:
    block = {"position": [0, 8], "mean": [3.0, 0.0], "max": [float("nan"), 2.0]}
    figure = figures.received_by_position(block)
    assert figure.layout.yaxis.type == "log"
    assert {t.name: t.y for t in figure.data} == {"mean": (3, None), "maximum": (None, 2)}


def test_rhythm_marks_sit_on_their_lines_and_tokens_are_escaped() -> None:
    block = rhythm_block(60)
    tokens = ["<b>x</b>"] * 60
    marks = {"preplan": [8, 17, 99], "anchor": [6]}
    waad, fai, preplan, anchor = figures.rhythm(block, tokens=tokens, marks=marks).data
    assert (preplan.x, preplan.y, preplan.yaxis) == ((8, 17), (8, 8), "y")
    assert (anchor.x, anchor.y, anchor.yaxis) == ((6,), (0.007,), "y2")
    assert (
        waad.customdata[0] == "&lt;b&gt;x&lt;/b&gt;" and "10–50 tokens later" in fai.hovertemplate
    )


def test_a_long_rhythm_is_thinned_but_keeps_its_peaks_and_slides() -> None:
    block = rhythm_block(50_000)
    block["waad"][12_345], block["fai"][43_210] = 77.0, 0.9
    figure = figures.rhythm(block, marks={"preplan": list(range(50_000))})
    waad, fai, preplan = figure.data
    assert len(waad.x) <= 8192 and len(preplan.x) == 1500
    assert 77 in waad.y and 0.9 in fai.y
    assert preplan.name == "1,500 strongest of 50,000 preplan tokens" and 12_345 in preplan.x
    assert figure.layout.xaxis.rangeslider.visible and figure.layout.xaxis.range[1] < 500
    # The one huge FAI would flatten the rest: it is left out of the frame, and said so.
    assert figure.layout.yaxis2.range[1] < 0.1
    assert figure.layout.annotations[0].text == "1 higher point not shown, up to 90\u00a0%"


@pytest.mark.parametrize("name", ["waad", "fai"])
def test_a_rhythm_with_one_fact_has_one_panel(name: str) -> None:
    block = {"position": [0, 1], name: [0.1, 0.2]}
    assert [t.name for t in figures.rhythm(block).data] == [name.upper()]


def test_a_causal_thumbnail_is_blank_above_the_diagonal() -> None:
    trace = figures.thumbnail({"cells": CAUSAL, "tokens_per_cell": 128}).data[0]
    assert [list(row) for row in trace.customdata] == [
        [1, None, None],
        [0.4, 0.6, None],
        [0.00001, 0.3, 0.7],
    ]
    assert list(trace.z[0]) == [0, None, None] and trace.z[2][0] == -4  # the floor of the log scale
    assert trace.x == ("0–127", "128–255", "256–383")
    linear = figures.thumbnail({"cells": CAUSAL}, log=False).data[0]
    assert list(linear.z[1]) == [0.4, 0.6, None]


def test_a_bidirectional_thumbnail_is_drawn_whole() -> None:
    trace = figures.thumbnail({"cells": [[0.5, 0.5], [0.0, 1.0]]}, log=False).data[0]
    assert [list(row) for row in trace.z] == [[0.5, 0.5], [0, 1]]


def test_empty_blocks_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="watch at least one layer"):
        figures.sink_map({"alpha": []})
    with pytest.raises(ValueError, match="2 layers but 1 layer numbers"):
        figures.entropy_map({**HEADS, "layers": [1]})
    with pytest.raises(ValueError, match="watch the fact 'received'"):
        figures.received_by_position({})
    with pytest.raises(ValueError, match="neither WAAD nor FAI"):
        figures.rhythm({"position": [0], "waad": [None]})
    with pytest.raises(ValueError, match="square grid"):
        figures.thumbnail({"cells": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="theme must be one of dark, light"):
        figures.sink_map(SINKS, theme="blue")


def test_without_plotly_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "regard\[report\]"'):
        figures.sink_map(SINKS)


def test_tokens_html_tints_marks_and_escapes() -> None:
    tokens = ["<script>", ' "a"', "\n", "z"]
    view = {"label": "<i>", "unit": "&", "values": [0.0, 1.0, None, 4.0]}
    text = figures.tokens_html(tokens, view, {"anchor": [3]})
    assert "<script>" not in text and "<i>" not in text and "&lt;script&gt;" in text
    assert text.count("<span") == 4 and "↵\n" in text and "no value" in text
    assert "2px dotted" in text.split("<span")[-1] and "0.60" in text.split("<span")[-1]
    assert "First 2 of 4 tokens" in figures.tokens_html(tokens, view, limit=2)
    with pytest.raises(ValueError, match="4 tokens but 1 values"):
        figures.tokens_html(tokens, {"values": [1.0]})


def test_a_heavy_tail_gets_logarithmic_levels_and_a_flat_view_none() -> None:
    heavy = [0.5 + 0.001 * i for i in range(500)] + [4000.0]
    edges, scale = look.level_edges(heavy)
    assert scale == "log" and len(edges) == look.LEVELS - 1 and edges == sorted(edges)
    assert look.level_edges([1.0, 1.0, None]) == ([], "linear")


def test_ramps_rise_in_lightness_without_turning() -> None:
    for theme, sign in (("light", -1), ("dark", 1)):
        steps = [
            sum(w * int(c[i : i + 2], 16) for w, i in ((0.21, 1), (0.72, 3), (0.07, 5)))
            for c in look.ramp(theme, 32)
        ]
        assert all(sign * (b - a) > 0 for a, b in itertools.pairwise(steps))


def test_the_terminal_shows_tokens_as_they_are() -> None:
    from rich.console import Console

    overview = {
        "meta": {"title": "[red]t[/red]", "model": "m", "notes": ["[bold]n"]},
        "tokens": ["[red]", " b"],
        "views": {"received": {"label": "Received", "values": [3.0, 1.0]}},
        "sinks": {**SINKS, "rate": 0.66, "hidden": [{"position": 1, "token": "[/x]", "heads": 2}]},
    }
    console = Console(record=True, width=100, file=io.StringIO())
    terminal.show(overview, console=console)
    text = console.export_text()
    for words in ("[red]t[/red]", "[bold]n", "[red] @0", "“[/x]” at 1", "66\u00a0%"):
        assert words in text
    terminal.show({}, console=console)
