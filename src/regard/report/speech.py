"""The page of one audio clip: spectrogram, transcript and cross-attention of each word."""

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
from regard.report.table import Cell, Column, Table, right, shorten

View = Mapping[str, Any]


def write_page(view: View, path: Any) -> Path:
    """Write the page of a clip to `path` as one HTML file that opens offline; return the path."""
    return _write(view, path, render_page)


def render_page(view: View) -> str:
    """Return the page as text; the same view gives the same text. All words are escaped."""
    meta = view.get("meta") or {}
    cost = [(str(k), str(v)) for k, v in (meta.get("cost") or {}).items() if v not in (None, "")]
    sections = [
        _map_section(view),
        _table_section(view),
        _heads_section(view),
        _single_section(view),
        costs(cost, "Exact cross attention.", meta),
    ]
    under = [str(meta[k]) for k in ("model", "clip") if meta.get(k)]
    if meta.get("seconds") is not None:
        under.append(f"{float(meta['seconds']):.1f} s of sound")
    under.append(f"{meta.get('layers')} decoder layers × {meta.get('heads')} heads")
    return Page(
        "Cross-attention of a transcript",
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
    verb = "was" if len(words) == 1 else "were"
    facts = [(_counted(len(words), "word"), f"in {_counted(len(tokens), 'token')} {verb} heard.")]
    best = best_head(heads)
    if best and len(words) > 2:  # one or two words have no order to follow
        layer, head, value = best
        facts.append(
            (
                f"{value:.2f}",
                "is the highest rank correlation of word order and attended time: "
                f"head {head} of layer {layer}.",
            )
        )
    dropped = finite(view.get("dropped"))
    if dropped is not None and view.get("all_frames") != view.get("frames"):
        text = "of the attention is on the padding after the clip, which is not shown."
        facts.append((percent(dropped), text))
    errors = view.get("errors") or {}
    if errors.get("start") is not None:
        more = ""
        if errors.get("theirs") is not None:
            more = f" Token time stamps of transformers: {errors['theirs']:.2f} s."
        facts.append(
            (
                f"{errors['start']:.2f} s",
                "is the mean error of the word starts against the synthesiser’s time "
                f"stamps.{more}",
            )
        )
    return facts


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def best_head(heads: View) -> tuple[int, int, float] | None:
    """(layer, head, rank correlation) of the head that follows the sound best."""
    rows = heads.get("monotone") or []
    scores = [
        (float(v), layer, head)
        for layer, row in zip(heads.get("layers") or range(len(rows)), rows)
        for head, v in enumerate(row)
        if finite(v) is not None
    ]
    if not scores:
        return None
    value, layer, head = max(scores)
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
    # plotly reads a few tags in labels: they are made visible instead
    labels = [f"{escape(shorten(w['text'], 22))} " for w in words]
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
    mark = {"color": ink["anchor"], "line": {"width": 2}}
    for key, name, symbol, size in (
        ("true_start", "true start", "line-ns-open", 11),
        ("theirs", "transformers’ time stamp", "diamond-open", 8),
    ):
        points = [(w[key], row) for row, w in enumerate(words) if w.get(key) is not None]
        if points:
            traces.append(
                go.Scatter(
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    mode="markers",
                    name=name,
                    hoverinfo="skip",
                    marker={**mark, "symbol": symbol, "size": size},
                )
            )
    top = _ceiling(next(iter(maps.values())), 0.997)
    always = [True] * (len(traces) - first - len(maps))
    shown = {
        name: [True] * first + [i == at for i in range(len(maps))] + always
        for at, name in enumerate(maps)
    }
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
        "updatemenus": [figures._menu(shown, theme, 8)],
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


def _ceiling(rows: Any, quantile: float) -> float:
    """The share that gets the strongest colour: a few cells may exceed it."""
    values = sorted(v for row in rows for v in row if finite(v) is not None)
    return max(1e-6, values[int(quantile * (len(values) - 1))]) if values else 1.0


def _map_section(view: View) -> Section | None:
    if not view.get("words") or not view.get("maps"):
        return None
    plot = Plot(
        "map",
        listening_map(view),
        "Spectrogram over a heat map of words by time, with the time of each word as a bar.",
        "How to read this: a row is a word and sums to its share of attention on sound; a strong "
        "cell is a moment it attends to. The bars are word times from the alignment heads. "
        "Attention says where information was read, not how it was used.",
    )
    lead = (
        "Above, the model’s input spectrogram; below, the cross-attention of the decoder steps "
        "that predict each word. The menu selects single layers or the alignment heads."
    )
    return Section("Cross-attention over time", [plot], lead, "Map", "map")


def times(words: Sequence[View]) -> Table:
    """Start, end and attended time of each word, in seconds."""
    names = [("from", "start"), ("to", "end"), ("true start", "true_start"),
             ("transformers", "theirs"), ("peak", "peak"), ("centre", "centre"),
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
        f"standard deviation of the attended time, all heads.{stamp}"
    )
    lead = "Start and end of each word, and the time it attends to."
    return Section("Word times", [times(words), note], lead, "Times", "times")


def _heads_section(view: View) -> Section | None:
    heads = view.get("heads") or {}
    if not heads.get("monotone"):
        return None
    kinds = [
        ("monotone", "rank correlation of words and time", "follows the sound at %{z:.2f}",
         {"cmin": -1, "cmax": 1},
         "A strong cell is a head whose attended time follows the words in order."),
        ("entropy", "entropy in nats", "entropy %{z:.2f} nats", {},
         "A faint head attends to one moment, a strong one to much of the clip."),
        ("dropped", "share on padding", "%{z:.1%} on padding", {"cmin": 0},
         "A strong cell is a head that puts its attention on the padding after the clip."),
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
    return Section("Heads", [Row(plots, "pair")], lead, "Heads", "heads")


def _single_section(view: View) -> Section | None:
    maps = view.get("head_maps") or []
    if not maps:
        return None
    meta = view.get("meta") or {}
    total = int(meta.get("layers") or 0) * int(meta.get("heads") or 0)
    go = figures.plotly()
    plots = []
    for number, head_map in enumerate(maps):
        trace = go.Heatmap(
            z=[[short(v) for v in row] for row in head_map["cells"]],
            coloraxis="coloraxis",
            hoverinfo="skip",
        )
        hidden = {"visible": False, "fixedrange": True}
        layout = {
            "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
            "coloraxis": {"showscale": False, "cmin": 0, "cmax": _ceiling(head_map["cells"], 0.99)},
            "xaxis": hidden,
            "yaxis": {**hidden, "autorange": "reversed"},
        }
        name = f"Layer {head_map['layer']}, head {head_map['head']}"
        mark = " · alignment head" if head_map.get("alignment") else ""
        plots.append(
            Plot(
                f"ear{number}",
                figures._figure([trace], layout, "light"),
                f"Map of words by time of {name.lower()}.",
                f"**{name}** follows at {head_map['monotone']:.2f}{mark}",
            )
        )
    left = f", {len(maps)} of {total} heads" if len(maps) < total else ""
    lead = (
        f"Words run down, time runs across{left}; those that follow the sound best come first. "
        "Each map has its own colours."
    )
    return Section("Head by head", [Row(plots, "grid")], lead, "Single heads", "single")
