"""The page of one utterance: cross-attention, saliency, and the reliability of both."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from regard.report import figures
from regard.report.chart import Chart, Line, Panel
from regard.report.document import Page, Plot, Row, Section
from regard.report.look import INKS, centres, finite, over, short
from regard.report.page import ends
from regard.report.page import write_page as _write
from regard.report.sound import spectrogram
from regard.report.table import Column, Table, right

View = Mapping[str, Any]
SOLID = 0.8  # reliability from which on a correlation is worth reading closely


def write_page(view: View, path: Any) -> Path:
    """Write the page to `path` as one HTML file that opens offline; return the path."""
    return _write(view, path, render_page)


def render_page(view: View) -> str:
    """Return the page as text; the same view gives the same text. All words are escaped."""
    sections = [
        _maps_section(view),
        _cells_section(view),
        _heads_section(view),
        _deletion_section(view),
        _trust_section(view),
    ]
    meta = view.get("meta") or {}
    seconds = float(view.get("seconds_per_step") or 0) * float(view.get("steps") or 0)
    return Page(
        "Cross-attention and saliency",
        [section for section in sections if section],
        intro=[f"“{view.get('transcript') or ''}”"],
        about="cross attention and saliency",
        under=[
            *(str(meta[k]) for k in ("model", "clip") if meta.get(k)),
            f"{seconds:.1f} s of sound",
            f"{(view.get('settings') or {}).get('masks', 0):,} masks",
        ],
        facts=cards(view),
    ).html()


def badge(view: View) -> tuple[str, str]:
    """The reliability of the saliency, and in words what it means for every correlation.

    >>> badge({"reliability": {"pooled": [0.5, 0.64]}, "bound": 0.8})[0]
    '0.64'
    """
    whole = float(view["reliability"]["pooled"][1])
    most = float(view["bound"])
    word = "reliable" if whole >= SOLID else "not yet reliable" if whole >= 0.5 else "noisy"
    more = "" if whole >= SOLID else " More masks would tell more."
    return (
        f"{whole:.2f}",
        f"is the split-half reliability of the saliency: {word}. No correlation with it can be "
        f"expected above {most:.2f}.{more}",
    )


def cards(view: View) -> list[tuple[str, str]]:
    """Up to four facts, each a short figure and the sentence it begins."""
    facts = []
    for on, words in (("input", "the saliency of the sound"), ("states", "that of its encoding")):
        rho = view[on]["pearson"]["all"]
        if rho is not None:
            text = f"is the correlation of cross attention, all heads averaged, with {words} "
            facts.append((f"{rho:.2f}", f"{text}(squared {rho * rho:.2f})."))
    facts.append(badge(view))
    curves = view.get("deletion")
    if curves:
        s = curves["scores"]
        text = (
            f"is attention’s deletion score, of 100; saliency reaches {s['saliency']:.0f}, on "
            f"attention’s grid {s['pooled']:.0f}, chance {s['random steps']:.0f}."
        )
        facts.append((f"{s['attention']:.0f}", text))
    return facts


def side_by_side(view: View, *, theme: str = "light") -> Any:
    """Draw the spectrogram over the maps of attention and of both saliencies, on one time axis.

    Raises ValueError when there are no maps.
    """
    go = figures.plotly()
    maps = view.get("maps") or {}
    if not maps:
        raise ValueError("there are no maps to draw")
    ink = INKS[theme]
    pieces = [str(p).strip() or "␣" for p in view["pieces"]]
    length = float(view.get("seconds_per_step") or 1.0) * float(view["steps"])
    panels: list[tuple[str, list[list[Any]], int]] = []
    if view.get("spectrogram"):
        panels.append(("spectrogram", view["spectrogram"], 110))
    panels += [(name, rows, 20 * len(pieces) + 10) for name, rows in maps.items()]
    gap = 34
    total = sum(h for _, _, h in panels) + gap * len(panels)
    traces, notes, top = [], [], float(total)
    word_axis = {
        "range": [len(pieces) - 0.5, -0.5],
        "tickvals": list(range(len(pieces))),
        "ticktext": [f"{p} " for p in pieces],
    }
    fixed = {"fixedrange": True, "showgrid": False}
    layout: dict[str, Any] = {"height": total + 70, "margin": {"l": 8, "r": 8, "t": 8, "b": 46}}
    for n, (name, rows, high) in enumerate(panels):
        sound = name == "spectrogram"
        top -= gap
        axis = "yaxis" if n == 0 else f"yaxis{n + 1}"
        layout[axis] = {**fixed, "domain": [max(0.0, (top - high) / total), top / total]}
        layout[axis] |= {"showticklabels": False} if sound else word_axis
        note = {"text": escape(name), "y": top / total, "font": {"size": 13, "color": ink["text"]}}
        notes.append({**over("", theme, "left", 0), **note})
        place = "y" if n == 0 else f"y{n + 1}"
        traces.append(
            spectrogram(rows, length, theme, place)
            if sound
            else go.Heatmap(
                z=[[short(v) for v in row] for row in rows],
                x=centres(len(rows[0]), length),
                y=list(range(len(rows))),
                yaxis=place,
                coloraxis="coloraxis",
                customdata=[[escape(p)] * len(rows[0]) for p in pieces],
                hovertemplate="“%{customdata}” at %{x:.2f} s: %{z:.2f}<extra></extra>",
            )
        )
        top -= high
    layout["xaxis"] = {**fixed, "range": [0, length], "title": {"text": "time (s)"}}
    layout["xaxis"] |= {"anchor": "free", "position": 0}
    layout["coloraxis"] = {"cmin": 0, "cmax": 1, "showscale": False}
    layout["annotations"] = notes
    return figures._figure(traces, layout, theme)


def _maps_section(view: View) -> Section | None:
    if not view.get("maps"):
        return None
    plot = Plot(
        "maps",
        side_by_side(view),
        "Heat maps over time, one row a word piece: cross attention and two kinds of saliency.",
        "How to read this: each row is scaled to its maximum. Where the maps differ, the decoder "
        "attended to something that did not change the prediction, or did not attend to something "
        "that did. The encoder’s output mixes moments; the sound does not.",
    )
    lead = (
        "Three maps of the same word pieces: cross-attention of the decoder, and two saliency "
        "maps, which measure how masking a cell changes the prediction of a piece."
    )
    return Section("Cross-attention and saliency maps", [plot], lead, "Maps", "maps")


def spectral(view: View, *, theme: str = "light") -> Any:
    """Draw the saliency of the spectrogram, with a menu of the word pieces."""
    go = figures.plotly()
    cells = view.get("cells") or {}
    if not cells:
        raise ValueError("there is no saliency of the spectrogram to draw")
    length = float(view.get("seconds_per_step") or 1.0) * float(view["steps"])
    traces = [
        go.Heatmap(
            z=[[short(v, 2) for v in row] for row in rows],
            x=centres(len(rows[0]), length),
            y=list(range(len(rows))),
            coloraxis="coloraxis",
            visible=n == 0,
            hovertemplate="%{x:.2f} s, mel bin %{y}: %{z:.2f}<extra></extra>",
        )
        for n, rows in enumerate(cells.values())
    ]
    shown = [[i == n for i in range(len(cells))] for n in range(len(cells))]
    fixed = {"fixedrange": True, "showgrid": False}
    layout = {
        "height": 330,
        "margin": {"l": 44, "r": 8, "t": 52, "b": 46},
        "coloraxis": {"cmin": 0, "cmax": 1, "showscale": False},
        "xaxis": {**fixed, "range": [0, length], "title": {"text": "time (s)"}},
        "yaxis": {**fixed, "title": {"text": "mel bin"}},
        "updatemenus": [figures._menu(dict(zip(cells, shown)), theme, 10)],
    }
    return figures._figure(traces, layout, theme)


def _cells_section(view: View) -> Section | None:
    if not view.get("cells"):
        return None
    plot = Plot(
        "cells",
        spectral(view),
        "Heat map of saliency over time and pitch.",
        "How to read this: masking a strong cell changes the prediction. Choose a word piece above "
        "the map.",
    )
    lead = "Saliency also has a frequency axis, which cross-attention has not."
    return Section("Saliency of the spectrogram", [plot], lead, "Spectrogram", "cells")


def _heads_section(view: View) -> Section | None:
    plots = []
    for on, words in (("input", "saliency of the sound"), ("states", "saliency of the encoding")):
        grid = ((view.get(on) or {}).get("pearson") or {}).get("heads")
        if not grid:
            continue
        figure = figures._layer_by_head(
            grid,
            None,
            f"{on}.pearson.heads",
            bar_title=f"correlation with the {words}",
            hover="Layer %{x}, head %{y}<br>correlation %{z:.2f}",
            theme="light",
            coloraxis={"cmin": 0, "cmax": 1},
        )
        plots.append(
            Plot(
                f"heads-{on}",
                figure,
                f"Heat map, layer by head: correlation with the {words}.",
                "One cell is one head. All heads averaged reach "
                f"{_number(view[on]['pearson']['all'])}, the last third of the layers "
                f"{_number(view[on]['pearson']['last'])}.",
            )
        )
    if not plots:
        return None
    kinds = [(on, kind) for on in ("input", "states") for kind in ("pearson", "spearman")]
    layers = range(len(view["input"]["pearson"]["layers"]))
    rows = [[f"layer {n}", *(view[on][kind]["layers"][n] for on, kind in kinds)] for n in layers]
    rows.append(["all", *(view[on][kind]["all"] for on, kind in kinds)])
    names = ("sound", "by ranks", "encoding", "by ranks")
    table = Table([Column("heads averaged"), *(right(name, _number) for name in names)], rows)
    lead = "Correlations over the rows of the maps above, each row standardised."
    blocks = [Row(plots, "pair"), table]
    return Section("Correlation with saliency per head", blocks, lead, "Heads", "heads")


def _number(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.2f}"


NAMES = {
    "saliency": "saliency, every cell",
    "pooled": "saliency, on attention’s grid",
    "attention": "cross attention",
    "random steps": "chance, by time",
    "random cells": "chance, by cell",
}


def curves(block: Mapping[str, Any]) -> Chart:
    """Error rates over the share of the input that was taken out, a line a map."""
    lines = [
        Line(
            f"{NAMES.get(name, name)}: {block['scores'][name]:.0f}",
            list(zip(block["percent"], values)),
            dashed=name in ("pooled", "random cells"),
        )
        for name, values in block["errors"].items()
    ]
    what = "words" if block.get("counted", "words") == "words" else "pieces"
    panel = Panel("share of the spectrogram taken out (%)", f"{what} wrong (%)", lines)
    title = "Errors over the share of the spectrogram taken out, for each map"
    return Chart([panel], title, size=(1048, 420))


def _deletion_section(view: View) -> Section | None:
    block = view.get("deletion")
    if not block:
        return None
    note = (
        "How to read this: the highest-ranked cells go first, each replaced by the mean of its mel "
        "bin. Attention has no pitch, so it takes out whole moments."
    )
    lead = (
        "The better a map, the earlier its curve rises and the larger the area under it, the "
        "number in the legend."
    )
    blocks = [curves(block), note]
    return Section("Deletion test", blocks, lead, "Deletion", "deletion")


def _trust_section(view: View) -> Section:
    settings = view.get("settings") or {}
    parts = view.get("reliability") or {}
    mixing = view.get("mixing") or {}
    rows = [
        ("Reliability of saliency on attention’s grid", _pair(parts.get("pooled"))),
        ("Reliability of saliency of every cell", _pair(parts.get("input"))),
        ("Reliability of saliency of the encoding", _pair(parts.get("states"))),
        ("Encoding less sound (context mixing)", _number(mixing.get("gap"))),
        ("The same, relative", _number(mixing.get("relative"))),
        ("Attention on padding, left out", _number(view.get("dropped"))),
    ]
    for name, spans in (view.get("spans") or {}).items():
        hit, mass, chance = (f"{100 * spans[key]:.0f} %" for key in ("hit", "mass", "chance"))
        text = f"{hit} of the peaks, {mass} of the mass (chance {chance})"
        rows.append((f"True word: {name}", text))
    for name, value in (view.get("references") or {}).items():
        rows.append(
            (
                name.replace("_", " "),
                f"{_number(value['attention'])} with attention, {_number(value['saliency'])} with "
                "saliency",
            )
        )
    rows.append(("Settings", ", ".join(f"{k} {v}" for k, v in settings.items())))
    return Section(
        "Reliability",
        [Table(["", ""], rows), *ends(view.get("notes") or [], view.get("meta") or {})],
        "Saliency is estimated with random masks. The correlation of the maps of two halves of the "
        "masks bounds every correlation on this page.",
        "Trust",
        "trust",
    )


def _pair(values: Any) -> str:
    if not values:
        return "–"
    return f"{float(values[1]):.2f} (halves {float(values[0]):.2f}, by Spearman and Brown)"
