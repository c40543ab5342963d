"""One function per figure: each takes one block of the overview and returns a plotly figure.

The same functions serve the HTML page, notebooks and the studio. Backgrounds are transparent; all
colours come from the template and from `look.INKS`, so that a page can switch a figure between
light and dark without drawing it anew in Python.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regard.report.look import (
    FLOOR,
    INKS,
    NBSP,
    check_theme,
    finite,
    ordinal,
    over,
    percent,
    short,
    template,
    visible,
)
from regard.report.words import tokens_html

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Block = Mapping[str, Any]
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}

__all__ = [
    "distance_map",
    "entropy_map",
    "is_long",
    "received_by_position",
    "rhythm",
    "sink_map",
    "thumbnail",
    "thumbnails",
    "tokens_html",
]


def plotly() -> Any:
    """Import plotly late, and say how to get it."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            'figures need plotly, which is not installed: pip install "regard[report]"'
        ) from error
    return go


def _figure(traces: list[Any], layout: dict[str, Any], theme: str) -> Figure:
    go = plotly()
    base = {
        "template": template(theme),
        "margin": {"l": 44, "r": 12, "t": 12, "b": 40},
        "dragmode": False,
        "autosize": True,
    }
    return go.Figure(data=traces, layout={**base, **layout})


def _menu(shown: Mapping[str, list[bool]], theme: str, above: int) -> dict[str, Any]:
    """A menu of which traces are visible, so many pixels above the left end of a figure."""
    muted = INKS[theme]["muted"]
    buttons = [
        {"label": html.escape(name), "method": "restyle", "args": [{"visible": visible}]}
        for name, visible in shown.items()
    ]
    return {
        **{"buttons": buttons, "type": "dropdown", "showactive": False, "pad": {"b": above}},
        **{"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        **{"bgcolor": "rgba(127,127,127,0.12)", "bordercolor": muted},
        "font": {"color": muted, "size": 12},
    }


def _grid(rows: Any, name: str) -> list[list[float | int | None]]:
    """Turn [layers, heads] into rows of heads: layers run along the wide side of the page."""
    cells = [[short(v) for v in row] for row in rows or []]
    if not cells or not cells[0]:
        raise ValueError(f"{name} is empty: watch at least one layer and one head")
    if len({len(row) for row in cells}) > 1:
        raise ValueError(f"{name} has layers with different numbers of heads: draw them apart")
    return [list(column) for column in zip(*cells, strict=True)]


def _layer_by_head(
    rows: Any,
    layers: Sequence[int] | None,
    name: str,
    *,
    bar_title: str,
    hover: str,
    theme: str,
    detail: Any = None,
    coloraxis: dict[str, Any] | None = None,
    bar: dict[str, Any] | None = None,
) -> Figure:
    go = plotly()
    z = _grid(rows, name)
    heads, count = len(z), len(z[0])
    names = [str(layer) for layer in (layers or range(count))]
    if len(names) != count:
        raise ValueError(f"{name} has {count} layers but {len(names)} layer numbers")
    gap = 1 if max(heads, count) <= 64 else 0
    trace = go.Heatmap(
        z=z,
        x=names,
        y=[str(h) for h in range(heads)],
        customdata=detail(z) if detail else None,
        coloraxis="coloraxis",
        xgap=gap,
        ygap=gap,
        hoverongaps=False,
        hovertemplate=hover + "<extra></extra>",
    )
    colorbar = {
        **{"orientation": "h", "x": 0, "xanchor": "left", "xpad": 0, "lenmode": "pixels"},
        **{"y": 1, "yref": "container", "yanchor": "top", "ypad": 22, "len": 200, **(bar or {})},
    }
    fixed = {"type": "category", "fixedrange": True, "showgrid": False, "ticks": ""}
    steps = {"x": max(1, math.ceil(count / 15)), "y": max(1, math.ceil(heads / 16))}
    layout = {
        "height": min(max(17 * heads, 120), 560) + 106,
        # Plotly reserves twice the room a horizontal colour bar needs: fix the margins.
        "margin": {"l": 44, "r": 8, "t": 62, "b": 44, "autoexpand": False},
        "annotations": [over(bar_title, theme, "left", 41)],
        "coloraxis": {"colorbar": colorbar, **(coloraxis or {})},
        "xaxis": {**fixed, "title": {"text": "layer"}, "dtick": steps["x"], "tickangle": 0},
        "yaxis": {**fixed, "title": {"text": "head"}, "dtick": steps["y"]},
    }
    return _figure([trace], layout, theme)


def sink_map(sinks: Block, *, theme: str = "light") -> Figure:
    """Draw the share of attention that each head gives the sink token; reads the block `sinks`.

    Raises ValueError when no layer or head was watched.

    >>> sink_map({"alpha": [[0.1, 0.9]], "layers": [3], "epsilon": 0.3}).data[0].z[1][0]
    0.9
    """
    where = ordinal(int(sinks.get("position") or 0))
    epsilon = finite(sinks.get("epsilon"))
    marks = {0.0: "0", 1.0: f"100{NBSP}%"}
    if epsilon is not None and 0 < epsilon < 1:
        marks[epsilon] = f"{percent(epsilon)}: a sink"
    return _layer_by_head(
        sinks.get("alpha"),
        sinks.get("layers"),
        "sinks.alpha",
        bar_title=f"share of attention on {where}",
        hover=f"Layer %{{x}}, head %{{y}}<br>%{{z:.1%}} of its attention<br>on {where}",
        theme=theme,
        coloraxis={"cmin": 0, "cmax": 1},
        bar={"tickvals": sorted(marks), "ticktext": [marks[v] for v in sorted(marks)]},
    )


def entropy_map(heads: Block, *, theme: str = "light") -> Figure:
    """Draw the mean entropy of each head in nats, [layers, heads]; reads `heads["entropy"]`.

    >>> entropy_map({"entropy": [[0.0, 2.0]]}).data[0].customdata[1][0]
    7.39
    """

    def spread(z: list[list[Any]]) -> list[list[Any]]:
        return [[None if v is None else short(math.exp(min(v, 50.0))) for v in row] for row in z]

    return _layer_by_head(
        heads.get("entropy"),
        heads.get("layers"),
        "heads.entropy",
        bar_title="mean entropy (nats)",
        hover="Layer %{x}, head %{y}<br>entropy %{z:.2f} nats, that of<br>"
        "uniform attention over %{customdata:,.3~r} tokens",
        theme=theme,
        detail=spread,
    )


def distance_map(heads: Block, *, theme: str = "light") -> Figure:
    """Draw the mean attention distance of each head in tokens; reads `heads["distance"]`.

    Heads listed in `heads["local"]` and `heads["global"]` carry a ring or a dot.
    """
    go = plotly()
    figure = _layer_by_head(
        heads.get("distance"),
        heads.get("layers"),
        "heads.distance",
        bar_title="mean distance (tokens)",
        hover="Layer %{x}, head %{y}<br>mean distance %{z:,.3~r} tokens",
        theme=theme,
    )
    shown = set(figure.data[0].x)
    looks = {
        "local": {"symbol": "circle-open", "size": 7, "line": {"width": 2}},
        "global": {"symbol": "circle", "size": 8, "line": {"width": 1, "color": "#ffffff"}},
    }
    for name, color in (("local", "preplan"), ("global", "anchor")):
        places = [(str(p[0]), str(p[1])) for p in heads.get(name) or [] if str(p[0]) in shown]
        if places:
            figure.add_trace(
                go.Scatter(
                    x=[p[0] for p in places],
                    y=[p[1] for p in places],
                    mode="markers",
                    name=name,
                    hoverinfo="skip",
                    marker={**looks[name], "color": INKS["dark"][color]},
                )
            )
    if len(figure.data) > 1:
        # Above the map on the right: the colour bar has the left.
        figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"})
    return figure


def received_by_position(by_position: Block, *, theme: str = "light") -> Figure:
    """Draw median, mean, 90th percentile and maximum of the attention received along the text."""
    go = plotly()
    positions = list(by_position.get("position") or [])
    if not positions:
        raise ValueError("by_position is empty: watch the fact 'received' to draw it")

    def heights(name: str) -> list[Any]:
        # A logarithmic axis cannot show zero: such a point is left open.
        numbers = (finite(v) for v in by_position.get(name) or [])
        return [short(v) if v is not None and v > 0 else None for v in numbers]

    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "median": ("median", {"line": {"width": 1.2}, "opacity": 0.75}),
        "p90": ("90th percentile", {"line": {"width": 1.2, "dash": "dash"}, "fill": "tonexty"}),
        "mean": ("mean", {"line": {"width": 2.6}}),
        "max": ("maximum", {"line": {"width": 1.2, "dash": "dot"}}),
    }
    ink = INKS[check_theme(theme)]
    traces: list[Any] = []
    for name, (label, style) in styles.items():
        y = heights(name)
        if not any(v is not None for v in y):
            continue
        if not traces:
            style.pop("fill", None)
        if style.get("fill"):
            style["fillcolor"] = ink["band"]
        style["line"]["color"] = ink["preplan" if name == "max" else "line"]
        traces.append(
            go.Scatter(
                x=positions,
                y=y,
                name=label,
                mode="lines+markers" if len(positions) < 3 else "lines",
                hovertemplate=f"{label} %{{y:.3~g}}<extra></extra>",
                **style,
            )
        )
    if not traces:
        raise ValueError("by_position has no positive value: nothing can be drawn on a log axis")
    span = max(positions) - min(positions) or 1
    layout = {
        "height": 340,
        "hovermode": "x unified",
        "margin": {"l": 56, "r": 12, "t": 44, "b": 44},
        "legend": {**LEGEND, "traceorder": "normal"},
        "xaxis": {
            "title": {"text": "position in the text (tokens)"},
            "fixedrange": True,
            # A sink at the first token would hide in the axis line.
            "range": [min(positions) - 0.012 * span, max(positions) + 0.012 * span],
            "hoverformat": ",d",
        },
        "yaxis": {
            "title": {"text": "attention received"},
            "type": "log",
            "fixedrange": True,
            "dtick": 1,
            "exponentformat": "power",
        },
    }
    return _figure(traces, layout, theme)


def _thin(xs: Sequence[Any], ys: Sequence[Any], limit: int) -> list[int]:
    """Choose about `limit` indices that keep the smallest and largest value of every stretch."""
    if len(xs) <= limit:
        return list(range(len(xs)))
    width = math.ceil(2 * len(xs) / limit)
    kept: list[int] = []
    for start in range(0, len(xs), width):
        known = [i for i in range(start, min(start + width, len(xs))) if ys[i] is not None]
        if known:
            ends = {min(known, key=lambda i: ys[i]), max(known, key=lambda i: ys[i])}
            kept.extend(sorted(ends))
    return kept


def is_long(block: Block) -> bool:
    """Say whether a rhythm is too long to read at once, so that its figure gets a slider."""
    return len(block.get("position") or []) > 480


def rhythm(
    block: Block,
    *,
    tokens: Sequence[str] | None = None,
    marks: Mapping[str, Sequence[int]] | None = None,
    limit: int = 8192,
    mark_limit: int = 1500,
    theme: str = "light",
) -> Figure:
    """Draw WAAD (how far back each token looks) over FAI (how much later tokens attend to it).

    `marks["preplan"]` become triangles on WAAD, `marks["anchor"]` diamonds on FAI. Texts above
    `limit` tokens keep the smallest and largest value of each stretch; above `mark_limit` only the
    strongest marks are drawn, and the legend says so. Raises ValueError when the block holds
    neither WAAD nor FAI.
    """
    go = plotly()
    positions = [int(p) for p in block.get("position") or []]
    ink = INKS[check_theme(theme)]
    window, horizon = block.get("window"), block.get("horizon")
    ahead = f" {horizon[0]}–{horizon[1]} tokens later" if horizon else " later"
    rows: list[tuple[str, str, str, str, str]] = [
        (
            "waad",
            "preplan",
            "y",
            "triangle-up",
            "mean distance %{y:.2f} tokens" + (f"<br>(clipped at {window})" if window else ""),
        ),
        (
            "fai",
            "anchor",
            "y2",
            "diamond",
            f"receives %{{y:.2%}} of the attention<br>of each token{ahead}",
        ),
    ]
    lines, points = [], []
    for name, mark, axis, symbol, words in rows:
        values = [short(v) for v in block.get(name) or []]
        if len(values) != len(positions) or not any(v is not None for v in values):
            continue
        kept = _thin(positions, values, limit)

        def hover_tokens(where: Iterable[int]) -> list[str] | None:
            # Plotly reads a little HTML in hover texts: a token such as "<b>" must be escaped.
            if tokens is None:
                return None
            known = len(tokens)
            return [html.escape(visible(tokens[p])) if 0 <= p < known else "" for p in where]

        shared = {
            "yaxis": axis,
            "hovertemplate": (
                "Token %{x}" + (" “%{customdata}”" if tokens is not None else "") + "<br>" + words
            )
            + "<extra></extra>",
        }
        lines.append(
            go.Scatter(
                x=[positions[i] for i in kept],
                y=[values[i] for i in kept],
                customdata=hover_tokens(positions[i] for i in kept),
                mode="lines",
                name=name.upper(),
                showlegend=False,
                line={"width": 1.4, "color": ink["line"]},
                **shared,
            )
        )
        at = dict(zip(positions, values, strict=True))
        chosen = [p for p in (marks or {}).get(mark) or [] if at.get(p) is not None]
        total = len(chosen)
        if total > mark_limit:
            chosen = sorted(sorted(chosen, key=lambda p: -(at[p] or 0))[:mark_limit])
        if chosen:
            label = f"{mark} tokens"
            if total > len(chosen):
                label = f"{len(chosen):,} strongest of {total:,} {label}"
            points.append(
                go.Scatter(
                    x=chosen,
                    y=[at[p] for p in chosen],
                    customdata=hover_tokens(chosen),
                    mode="markers",
                    name=label,
                    marker={"symbol": symbol, "size": 7, "color": ink[mark]},
                    **shared,
                )
            )
    if not lines:
        raise ValueError("rhythm holds neither WAAD nor FAI: watch them, or leave the figure out")
    both = len(lines) == 2
    only = lines[0].yaxis
    first, last = min(positions), max(positions)
    long = is_long(block)
    side = {"fixedrange": True, "rangemode": "tozero", "nticks": 5}
    layout: dict[str, Any] = {
        "height": (430 if both else 270) + (60 if long else 0),
        "dragmode": "pan" if long else False,
        "hovermode": "closest",
        "margin": {"l": 56, "r": 12, "t": 44, "b": 44},
        "legend": LEGEND,
        "xaxis": {
            "title": {"text": "position in the text (tokens)"},
            # Thousands of tokens drawn at once are a solid bar: begin with a stretch one can read,
            # and slide from there.
            "range": [first - 2, (first + 240 if long else last + 2)],
            "fixedrange": not long,
            "hoverformat": ",d",
            "tickformat": ",d",
            "rangeslider": {"visible": long, "thickness": 0.1, "range": [first - 2, last + 2]},
            "anchor": "y2" if both else only,
        },
    }
    if both or only == "y":
        layout["yaxis"] = {**side, "title": {"text": "WAAD (tokens)"}}
        layout["yaxis"]["domain"] = [0.54, 1] if both else [0, 1]
    if both or only == "y2":
        layout["yaxis2"] = {**side, "title": {"text": "FAI (share)"}, "tickformat": "~%"}
        layout["yaxis2"] |= {"domain": [0, 0.46] if both else [0, 1], "anchor": "x"}
        known = sorted(v for v in lines[-1].y if v is not None)
        usual = 1.3 * known[int(0.995 * (len(known) - 1))]
        # One sink token would press everything else flat; say what is left out instead.
        if usual > 0 and known[-1] > 3 * usual:
            above = sum(v > usual for v in known)
            layout["yaxis2"] |= {"range": [0, usual], "autorange": False}
            text = f"{above} higher point{'s' * (above > 1)} not shown, up to {percent(known[-1])}"
            layout["annotations"] = [over(text, theme, "right", 0) | {"yref": "y2 domain"}]
    return _figure(lines + points, layout, theme)


def _cells(block: Block, log: bool) -> tuple[list[list[Any]], list[list[Any]], list[str]]:
    """Return colours, shares and labels of a thumbnail; cells no query may see are None."""
    rows = [[finite(v) for v in row] for row in block.get("cells") or []]
    size = len(rows)
    if not size or any(len(row) != size for row in rows):
        raise ValueError("a thumbnail needs a square grid of cells: [[share, ...], ...]")
    causal = not any(v for i, row in enumerate(rows) for v in row[i + 1 :])
    shares = [
        [None if causal and j > i else short(v) for j, v in enumerate(row)]
        for i, row in enumerate(rows)
    ]
    step = max(int(block.get("tokens_per_cell") or 1), 1)
    labels = [str(i) if step == 1 else f"{i * step}–{(i + 1) * step - 1}" for i in range(size)]
    if not log:
        return shares, shares, labels
    colors = [
        [None if v is None else round(math.log10(max(v, FLOOR)), 2) for v in row] for row in shares
    ]
    return colors, shares, labels


def _thumbnail_trace(block: Block, log: bool) -> Any:
    colors, shares, labels = _cells(block, log)
    amount = "%{customdata:.2~%}" if log else "%{z:.2~%}"
    return plotly().Heatmap(
        z=colors,
        x=labels,
        y=labels,
        customdata=shares if log else None,
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate=f"Queries %{{y}}<br>keys %{{x}}<br>{amount} of the attention<extra></extra>",
    )


def _thumbnail_axis(log: bool) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": "share of attention", "side": "right"}}
    if not log:
        return {"cmin": 0, "colorbar": {**bar, "tickformat": "~%"}}
    powers = list(range(round(math.log10(FLOOR)), 1))
    ticks = {"tickvals": powers, "ticktext": [f"{100 * 10.0**p:g}{NBSP}%" for p in powers]}
    return {"cmin": powers[0], "cmax": 0, "colorbar": {**bar, **ticks}}


def thumbnail(
    block: Block, *, log: bool = True, bare: bool = False, theme: str = "light"
) -> Figure:
    """Draw one head's attention map, averaged down to N x N cells: row reads column.

    `log` spreads the colours over powers of ten; `bare` leaves out axes and colour bar, for a grid
    of many. Raises ValueError when the cells are not square.

    >>> thumbnail({"cells": [[1.0, 0.0], [0.5, 0.5]], "tokens_per_cell": 4}).data[0].x
    ('0–3', '4–7')
    """
    trace = _thumbnail_trace(block, log)
    axis: dict[str, Any] = {"type": "category", "fixedrange": True, "showgrid": False}
    axis |= {"visible": False} if bare else {"nticks": 5, "tickangle": 0}
    layout: dict[str, Any] = {
        "coloraxis": {**_thumbnail_axis(log), "showscale": not bare},
        "xaxis": {**axis, "title": {"text": "keys"}, "constrain": "domain"},
        "yaxis": {
            **axis,
            "title": {"text": "queries"},
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
        },
    }
    if bare:
        layout |= {"margin": {"l": 0, "r": 0, "t": 0, "b": 0}}
    else:
        title = str(block.get("label") or f"layer {block.get('layer')}, head {block.get('head')}")
        layout |= {"height": 460, "title": {"text": html.escape(title), "font": {"size": 14}}}
        layout |= {"margin": {"l": 56, "r": 12, "t": 48, "b": 48}}
    return _figure([trace], layout, theme)


def thumbnails(
    blocks: Sequence[Block], *, columns: int = 4, log: bool = True, theme: str = "light"
) -> Figure:
    """Draw several heads' thumbnails on one colour scale; reads the block `thumbnails`."""
    if not blocks:
        raise ValueError("no thumbnails to draw: choose at least one head")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    plotly()
    from plotly.subplots import make_subplots

    columns = min(columns, len(blocks))
    rows = math.ceil(len(blocks) / columns)
    titles = [
        html.escape(f"L{b.get('layer')} H{b.get('head')} {b.get('label') or ''}".strip())
        for b in blocks
    ]
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=titles,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.12, 0.3 / rows),
    )
    for index, block in enumerate(blocks):
        figure.add_trace(
            _thumbnail_trace(block, log), row=index // columns + 1, col=index % columns + 1
        )
        # Square cells: each subplot's y follows its own x.
        name = "" if index == 0 else str(index + 1)
        figure.layout[f"yaxis{name}"].update(scaleanchor=f"x{name}", constrain="domain")
        figure.layout[f"xaxis{name}"].update(constrain="domain")
    figure.update_xaxes(type="category", visible=False, fixedrange=True)
    figure.update_yaxes(type="category", visible=False, fixedrange=True, autorange="reversed")
    figure.update_annotations(font={"size": 11})
    figure.update_layout(
        template=template(theme),
        coloraxis=_thumbnail_axis(log),
        dragmode=False,
        height=60 + rows * 210,
        margin={"l": 12, "r": 12, "t": 40, "b": 12},
    )
    return figure
