"""What every renderer of a report shares: colours, rounding, and numbers and tokens in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

LEVELS = 10
NBSP = "\u00a0"
FLOOR = 1e-4  # the smallest share a logarithmic colour scale still tells apart

# Lightness changes in one direction only along each ramp, so it also reads without colour vision
# and in grey print; the low end recedes into the page on light and on dark.
RAMPS: dict[str, tuple[str, ...]] = {
    "light": ("#f3f2ee", "#d3e2ea", "#a3c8dd", "#6aa5cd", "#3a7cb5", "#1d5290", "#0e2c5c"),
    "dark": ("#1c2129", "#1d3550", "#22527f", "#3278b0", "#5ba1cf", "#97cae6", "#e3f3fb"),
}
# Okabe-Ito vermilion and bluish green: told apart from each other and from the blue ramp by every
# common type of vision.
INKS: dict[str, dict[str, str]] = {
    "light": {
        "text": "#23262b",
        "muted": "#5c626b",
        "grid": "#dfe0e0",
        "line": "#1d5f9e",
        "preplan": "#b94e00",
        "anchor": "#00775a",
        "band": "rgba(58,124,181,0.14)",
    },
    "dark": {
        "text": "#e8e6e1",
        "muted": "#a3a9b2",
        "grid": "#363c46",
        "line": "#6db3e2",
        "preplan": "#f59a4c",
        "anchor": "#3cc79e",
        "band": "rgba(109,179,226,0.14)",
    },
}
# Series of a chart, by theme: Okabe and Ito's colours, lighter on dark.
SERIES: dict[str, tuple[str, ...]] = {
    "light": (
        *("#0072b2", "#d55e00", "#008a65", "#b85a93"),
        *("#b07800", "#3a9fd6", "#7a7a7a", "#111111"),
    ),
    "dark": (
        *("#56a8e0", "#f28a45", "#35c79a", "#e39cc6"),
        *("#ecb63c", "#9bd3f5", "#a5a5a5", "#f2f2f2"),
    ),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def check_theme(theme: str) -> str:
    if theme not in RAMPS:
        raise ValueError(f"theme must be one of {', '.join(sorted(RAMPS))}, not {theme!r}")
    return theme


def finite(value: Any) -> float | None:
    """Return the number as a float, or None when it is missing, NaN or infinite (JSON has no NaN).

    >>> finite(2), finite(float("nan")), finite(None)
    (2.0, None, None)
    """
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def short(value: Any, digits: int = 3) -> float | int | None:
    """Round to a few significant digits, so that a long text stays a small file.

    >>> short(0.123456), short(1234.5), short(3.0), short(float("inf"))
    (0.123, 1230, 3, None)
    """
    number = finite(value)
    if number is None:
        return None
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def centres(count: int, length: float) -> list[float]:
    """The middles of `count` equal parts of an axis.

    >>> centres(2, 1.0)
    [0.25, 0.75]
    """
    return [round((i + 0.5) * length / count, 4) for i in range(count)]


def percent(share: float) -> str:
    """Write a share as a percentage with as many digits as it deserves.

    >>> percent(0.77), percent(0.034), percent(0.0004)
    ('77\\xa0%', '3.4\\xa0%', '0.04\\xa0%')
    """
    value = 100 * share
    digits = 0 if value >= 10 or value == 0 else 1 if value >= 1 else 2
    return f"{value:.{digits}f}{NBSP}%"


def ramp(theme: str, count: int = LEVELS) -> list[str]:
    """Return `count` hex colours spread evenly over the ramp of a theme, from "nothing" to "most".

    >>> ramp("light", 2)
    ['#f3f2ee', '#0e2c5c']
    """
    stops = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in RAMPS[check_theme(theme)]]
    colors = []
    for step in range(count):
        place = step / max(count - 1, 1) * (len(stops) - 1)
        low = min(int(place), len(stops) - 2)
        mixed = (
            round(a + (b - a) * (place - low))
            for a, b in zip(stops[low], stops[low + 1], strict=True)
        )
        colors.append("#" + "".join(f"{part:02x}" for part in mixed))
    return colors


def level_edges(values: Iterable[float | None], levels: int = LEVELS) -> tuple[list[float], str]:
    """Choose the thresholds between colour levels, and say whether they are "linear" or "log".

    Attention received spreads over orders of magnitude: there equal steps of the logarithm show
    more than equal steps of the value.

    >>> level_edges([0.0, 1.0, 2.0], levels=3)
    ([0.666..., 1.333...], 'linear')
    """
    known = sorted(v for v in map(finite, values) if v is not None)
    if not known or known[0] == known[-1]:
        return [], "linear"

    def quantile(q: float) -> float:
        return known[min(int(q * len(known)), len(known) - 1)]

    low, high, scale = quantile(0.25), quantile(0.995), "linear"
    # The one strongest token is often a sink, far above all others: it must not set the scale.
    at = min(int(0.998 * len(known)), len(known) - 2)
    if known[0] >= 0 and quantile(0.5) * 20 <= known[-1]:
        low, high, scale = max(quantile(0.4), known[-1] * FLOOR), known[at], "log"
    if high <= low:
        low, high, scale = known[0], known[-1], "linear"
    if scale == "log":
        ratio = math.log(high / low)
        return [low * math.exp(ratio * i / levels) for i in range(1, levels)], scale
    return [low + (high - low) * i / levels for i in range(1, levels)], scale


def visible(token: str) -> str:
    """Show a token in a line of prose: no edge spaces, newlines as arrows, nothing as a dot.

    >>> visible(" the"), visible("\\n\\n"), visible("  ")
    ('the', '↵↵', '␣')
    """
    text = token.replace("\r\n", "\n").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")
    return text.strip() or ("␣" if text else "·")


def template(theme: str = "light") -> dict[str, Any]:
    """Return the plotly template of a theme: transparent, with our ramp as sequential scale."""
    ink = INKS[check_theme(theme)]
    scale = [[i / (len(RAMPS[theme]) - 1), c] for i, c in enumerate(RAMPS[theme])]
    title, ticks = ({"color": ink["muted"], "size": size} for size in (12, 11))
    axis = {
        **dict.fromkeys(("gridcolor", "linecolor", "tickcolor"), ink["grid"]),
        **{"zeroline": False, "automargin": True, "tickfont": ticks},
        "title": {"standoff": 8, "font": title},
    }
    bar = {"thickness": 9, "outlinewidth": 0, "tickfont": ticks, "title": {"font": title}}
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "color": ink["text"], "size": 13},
            "colorway": [ink["line"], ink["preplan"], ink["anchor"], ink["muted"]],
            "coloraxis": {"colorscale": scale, "colorbar": bar},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"font": {"color": ink["text"], "size": 12}, "bgcolor": "rgba(0,0,0,0)"},
            "hoverlabel": {
                "bgcolor": "#2b3038" if theme == "dark" else "#ffffff",
                "bordercolor": ink["grid"],
                "font": {"family": FONT, "color": ink["text"], "size": 13},
                "align": "left",
            },
        }
    }


def over(text: str, theme: str, side: str, pixels: int) -> dict[str, Any]:
    """Words over the left or right end of a figure's axes, as a plotly annotation.

    They name a colour bar: with a title of its own plotly would misplace those of the axes.
    """
    font = {"color": INKS[check_theme(theme)]["muted"], "size": 12}
    return {
        **{"text": text, "showarrow": False, "font": font},
        **{"x": int(side == "right"), "xanchor": side, "xref": "paper"},
        **{"y": 1, "yanchor": "bottom", "yref": "paper", "yshift": pixels},
    }


def ordinal(position: int) -> str:
    """Name a token by its place, as a person would.

    >>> ordinal(0), ordinal(7)
    ('the first token', 'token 7')
    """
    return "the first token" if position == 0 else f"token {position}"
