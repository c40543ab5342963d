"""The page about one clip: its spectrogram, what was heard, and where each word looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from regard.report import figures
from regard.report.document import Page, Plot, Row, Section
from regard.report.look import INKS, centres, finite, over, percent, short
from regard.report.page import costs
from regard.report.page import write_page as _write
from regard.report.sound import spectrogram
from regard.report.table import Cell, Column, Table, right

View = Mapping[str, Any]


def write_page(view: View, path: Any) -> Path:
    """Write the page of a clip to `path` as one HTML file that opens offline; return the path."""
    return _write(view, path, render_page)


def render_page(view: View) -> str:
    """Return the page as text; the same view gives the same text. All words are escaped."""
    meta = view.get("meta") or {}
    sections = [
        _map_section(view),
        _table_section(view),
        _heads_section(view),
        _single_section(view),
        costs(_cost_rows(view), "Exact cross attention.", meta),
    ]
    under = [str(meta[k]) for k in ("model", "clip") if meta.get(k)]
    if meta.get("seconds") is not None:
        under.append(f"{float(meta['seconds']):.1f} s of sound")
    under.append(f"{meta.get('layers')} decoder layers × {meta.get('heads')} heads")
    return Page(
        "Where each word listens",
        [section for section in sections if section],
        intro=[f"“{view.get('transcript') or ''}”"],
        about="cross attention of a speech model",
        under=under,
        facts=cards(view),
    ).html()


def cards(view: View) -> list[tuple[str, str]]:
    """Up to four facts, each a short figure and the sentence it begins."""
    words = view.get("words") or []
    heads = view.get("heads") or {}
    tokens = view.get("tokens") or []
    made = [
        (
            _counted(len(words), "word"),
            f"in {_counted(len(tokens), 'token')} {'was' if len(words) == 1 else 'were'} heard.",
        )
    ]
    best = best_head(heads)
    if best and len(words) > 2:  # one or two words have no order to follow
        layer, head, value = best
        made.append(
            (
                f"{value:.2f}",
                f"is how well head {head} of layer {layer} follows the sound "
                "(rank correlation of words and where they look; 1 is word by word).",
            )
        )
    dropped = finite(view.get("dropped"))
    if dropped is not None and view.get("all_frames") != view.get("frames"):
        made.append(
            (
                percent(dropped),
                "of the attention falls on the silence that pads the clip to the "
                "model’s window; it is not shown.",
            )
        )
    errors = view.get("errors") or {}
    if errors.get("start") is not None:
        more = ""
        if errors.get("theirs") is not None:
            more = f" Transformers’ own token time stamps: {errors['theirs']:.2f} s."
        made.append(
            (
                f"{errors['start']:.2f} s",
                "is the mean distance of the word starts from the true "
                f"ones, which this clip’s synthesiser told.{more}",
            )
        )
    return made


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def best_head(heads: View) -> tuple[int, int, float] | None:
    """(layer, head, rank correlation) of the head that follows the sound best."""
    rows = heads.get("monotone") or []
    found = [
        (float(v), layer, head)
        for layer, row in zip(heads.get("layers") or range(len(rows)), rows)
        for head, v in enumerate(row)
        if finite(v) is not None
    ]
    if not found:
        return None
    value, layer, head = max(found)
    return layer, head, value


def listening_map(view: View, *, theme: str = "light") -> Any:
    """Draw the spectrogram over the map of words and time, with the words' times as marks.

    A menu chooses between the mean over all heads, the alignment heads and each layer.
    """
    go = figures.plotly()
    ink = INKS[theme]
    words = view.get("words") or []
    maps = view.get("maps") or {}
    if not words or not maps:
        raise ValueError("no word was heard: there is no map to draw")
    length = float(view.get("seconds_per_frame") or 1.0) * float(view["frames"])
    unit = "s" if view.get("seconds_per_frame") else "encoder steps"
    labels = [f"{_short(w['text'])} " for w in words]
    rows = list(range(len(words)))
    traces: list[Any] = []
    spectrum = view.get("spectrogram")
    if spectrum:
        traces.append(spectrogram(spectrum, length, theme, "y2"))
    first = len(traces)
    for at, (_, cells) in enumerate(maps.items()):
        traces.append(
            go.Heatmap(
                z=[[short(v) for v in row] for row in cells],
                x=centres(len(cells[0]), length),
                y=rows,
                customdata=[[w["text"]] * len(cells[0]) for w in words],
                coloraxis="coloraxis",
                visible=at == 0,
                hovertemplate="“%{customdata}” at %{x:.2f} s<br>%{z:.2%} of its attention"
                "<extra></extra>",
            )
        )
    xs: list[Any] = []
    ys: list[Any] = []
    for row, word in enumerate(words):
        if word.get("start") is not None:
            xs += [word["start"], word["end"], None]
            ys += [row + 0.42, row + 0.42, None]
    if xs:
        traces.append(
            go.Scatter(
                x=xs,
                y=ys,
                mode="lines",
                name="word time (time warping)",
                hoverinfo="skip",
                line={"color": ink["preplan"], "width": 3},
            )
        )
    for key, name, symbol in (
        ("true_start", "true start", "line-ns-open"),
        ("theirs", "transformers’ time stamp", "diamond-open"),
    ):
        found = [(w[key], row) for row, w in enumerate(words) if w.get(key) is not None]
        if found:
            traces.append(
                go.Scatter(
                    x=[x for x, _ in found],
                    y=[y for _, y in found],
                    mode="markers",
                    name=name,
                    hoverinfo="skip",
                    marker={
                        "symbol": symbol,
                        "size": 11 if key == "true_start" else 8,
                        "color": ink["anchor"],
                        "line": {"width": 2},
                    },
                )
            )
    top = _ceiling(maps)
    always = [True] * (len(traces) - first - len(maps))
    buttons = [
        {
            "label": name,
            "method": "restyle",
            "args": [{"visible": [True] * first + [i == at for i in range(len(maps))] + always}],
        }
        for at, name in enumerate(maps)
    ]
    above, below = 96, 106  # of the axes: menu and scale of colours; time and legend
    inner = 170 + 24 * len(words)
    share = 150 / inner if spectrum else 0.0
    fixed = {"fixedrange": True, "showgrid": False}
    layout = {
        "height": above + inner + below,
        "margin": {"l": 8, "r": 8, "t": above, "b": below},
        "coloraxis": {
            "cmin": 0, "cmax": top,
            "colorbar": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "ypad": 0,
                         "yanchor": "top", "yref": "container", "lenmode": "pixels", "len": 200,
                         "tickformat": ".0%"},
        },
        "annotations": [over("share of a word’s attention", theme, "right", 42)],
        "xaxis": {**fixed, "range": [0, length], "anchor": "y",
                  "title": {"text": f"time ({unit})", "standoff": 8}},
        "yaxis": {**fixed, "range": [len(words) - 0.5, -0.5], "tickvals": rows, "ticktext": labels,
                  "domain": [0, 1 - share - (0.02 if spectrum else 0)]},
        "legend": {"orientation": "h", "x": 0, "y": 0, "yanchor": "bottom", "yref": "container"},
        "updatemenus": [figures._menu(buttons, theme, 8)],
    }  # fmt: skip
    if spectrum:
        layout["yaxis2"] = {**fixed, "domain": [1 - share, 1], "showticklabels": False,
                            "title": {"text": "pitch"}, "anchor": "x"}  # fmt: skip
        edges = [w["start"] for w in words if w.get("start") is not None]
        layout["shapes"] = [
            {"type": "line", "x0": x, "x1": x, "y0": 1 - share, "y1": 1, "yref": "paper",
             "line": {"color": ink["preplan"], "width": 1}}
            for x in edges
        ]  # fmt: skip
    return figures._figure(traces, layout, theme)


def _ceiling(maps: Mapping[str, Any]) -> float:
    """The share that gets the strongest colour: a few cells may exceed it."""
    values = sorted(v for row in next(iter(maps.values())) for v in row if finite(v) is not None)
    return max(1e-6, values[int(0.997 * (len(values) - 1))]) if values else 1.0


def _short(text: str) -> str:
    # Plotly reads a few tags in labels: they are made visible instead.
    text = text if len(text) <= 22 else text[:21] + "…"
    return escape(text)


def _map_section(view: View) -> Section | None:
    if not view.get("words") or not view.get("maps"):
        return None
    plot = Plot(
        "map",
        listening_map(view),
        "Spectrogram over a heat map of words by time, with the time of each word as a bar.",
        "How to read this: each row is a word and adds up to the share of its attention that falls "
        "on sound; a dark cell is a moment it looks at. The bars are word times from the alignment "
        "heads. What a word looks at is not all that it depends on: attention says where "
        "information was fetched from, not what it did.",
    )
    lead = (
        "Above the sound as the model gets it, below what each word’s decoder steps look at while "
        "they predict it. The menu shows single layers, or the heads that are known to follow the "
        "sound."
    )
    return Section("Words and time", [plot], lead, "Map", "map")


def times(words: Sequence[View]) -> Table:
    """When each word was said and where it looked, in seconds."""
    names = [("from", "start"), ("to", "end"), ("true start", "true_start"),
             ("transformers", "theirs"), ("looks most at", "peak"), ("centre", "centre"),
             ("spread", "spread")]  # fmt: skip
    shown = [(name, key) for name, key in names if any(w.get(key) is not None for w in words)]
    columns = [Column("word"), *(right(f"{name} (s)", "{:.2f}".format) for name, _ in shown)]
    rows = [
        [
            Cell(str(word["text"]), "code"),
            *(word.get(key) for _, key in shown),
            float(word.get("dropped") or 0.0),
        ]
        for word in words
    ]
    return Table([*columns, right("on padding", percent)], rows)


def _table_section(view: View) -> Section | None:
    words: Sequence[Mapping[str, Any]] = view.get("words") or []
    if not words:
        return None
    stamp = ""
    if any("theirs" in w for w in words):
        stamp = (
            " Transformers’ stamps come from the rows in which a token is the input, one step "
            "after the rows that predict it, so they tend to come about one token later."
        )
    note = (
        "From and to: dynamic time warping over the alignment heads. Centre and spread: mean and "
        f"standard deviation of the time a word looks at, all heads.{stamp}"
    )
    lead = "When each word was said, and where it looked."
    return Section("Word times", [times(words), note], lead, "Times", "times")


def _heads_section(view: View) -> Section | None:
    heads = view.get("heads") or {}
    if not heads.get("monotone"):
        return None
    kinds = [
        ("monotone", "rank correlation of words and time", "follows the sound at %{z:.2f}",
         {"cmin": -1, "cmax": 1},
         "A strong cell is a head that moves on with every word; a faint one looks elsewhere."),
        ("entropy", "entropy in nats", "entropy %{z:.2f} nats", {},
         "A faint head looks at a moment, a strong one takes in much of the clip."),
        ("dropped", "share on padding", "%{z:.1%} on padding", {"cmin": 0},
         "A strong head rests on the silence behind the clip: it has nothing to look for."),
    ]  # fmt: skip
    plots = []
    for key, bar, hover, axis, caption in kinds:
        if not heads.get(key):
            continue
        figure = figures._layer_by_head(
            heads[key],
            heads.get("layers"),
            f"heads.{key}",
            bar_title=bar,
            hover=f"Layer %{{x}}, head %{{y}}<br>{hover}",
            theme="light",
            coloraxis=axis,
        )
        plots.append(Plot(key, figure, f"Heat map, layer by head: {bar}.", caption))
    lead = "Means over the words of this clip, one cell a head."
    return Section("What each head does", [Row(plots, "pair")], lead, "Heads", "heads")


def _single_section(view: View) -> Section | None:
    maps = view.get("head_maps") or []
    if not maps:
        return None
    meta = view.get("meta") or {}
    total = int(meta.get("layers") or 0) * int(meta.get("heads") or 0)
    go = figures.plotly()
    plots = []
    for number, one in enumerate(maps):
        flat = sorted(v for row in one["cells"] for v in row)
        trace = go.Heatmap(
            z=[[short(v) for v in row] for row in one["cells"]],
            coloraxis="coloraxis",
            hoverinfo="skip",
        )
        hidden = {"visible": False, "fixedrange": True}
        layout = {
            "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
            "coloraxis": {
                "showscale": False,
                "cmin": 0,
                "cmax": max(1e-6, flat[int(0.99 * (len(flat) - 1))]),
            },
            "xaxis": hidden,
            "yaxis": {**hidden, "autorange": "reversed"},
        }
        name = f"Layer {one['layer']}, head {one['head']}"
        mark = " · alignment head" if one.get("alignment") else ""
        plots.append(
            Plot(
                f"ear{number}",
                figures._figure([trace], layout, "light"),
                f"Map of words by time of {name.lower()}.",
                f"**{name}** follows at {one['monotone']:.2f}{mark}",
            )
        )
    left = f", {len(maps)} of {total} heads" if len(maps) < total else ""
    lead = (
        f"Words run down, time runs across{left}; those that follow the sound best come first. "
        "Each map has its own colours."
    )
    return Section("Head by head", [Row(plots, "grid")], lead, "Single heads", "single")


def _cost_rows(view: View) -> list[tuple[str, str]]:
    found = (view.get("meta") or {}).get("cost") or {}
    return [(str(k), str(v)) for k, v in found.items() if v not in (None, "")]
