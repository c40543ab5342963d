"""What the pages about sound share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.report.figures import plotly
from regard.report.look import INKS, centres, short


def spectrogram(rows: Sequence[Sequence[Any]], length: float, theme: str, axis: str) -> Any:
    """The sound `[mel bins, frames]` over `length` seconds or steps: ink on the page's ground."""
    return plotly().Heatmap(
        z=[[short(v) for v in row] for row in rows],
        x=centres(len(rows[0]), length),
        y=list(range(len(rows))),
        yaxis=axis,
        colorscale=[[0, "rgba(127,127,127,0)"], [1, INKS[theme]["text"]]],
        showscale=False,
        hoverinfo="skip",
    )
