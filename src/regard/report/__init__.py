"""Figures and the self-contained HTML page, drawn from one plain dictionary, the overview.

This package imports no other part of regard: whoever measures hands over an overview, and
notebooks, the page and the studio share the figures.
"""

from __future__ import annotations

from typing import Any

from regard.report.figures import (
    distance_map,
    entropy_map,
    received_by_position,
    rhythm,
    sink_map,
    thumbnail,
    thumbnails,
    tokens_html,
)
from regard.report.page import render_page, write_page

__all__ = [
    "render_page",
    "show",
    "write_page",
    "distance_map",
    "entropy_map",
    "received_by_position",
    "rhythm",
    "sink_map",
    "thumbnail",
    "thumbnails",
    "tokens_html",
]


def show(overview: dict[str, Any]) -> list[Any] | None:
    """In a notebook the coloured text and the figures, elsewhere the summary on the terminal."""
    try:
        shell: Any = get_ipython()  # type: ignore[name-defined]  # notebooks and IPython define it
    except NameError:
        shell = None
    if type(shell).__name__ != "ZMQInteractiveShell":
        from regard.report import terminal

        terminal.show(overview)
        return None
    from IPython.display import HTML, display

    view = (overview.get("views") or {}).get("received")
    if view:
        display(HTML(tokens_html(overview["tokens"], view, overview.get("marks"))))
    makers: list[tuple[str, Any]] = [
        ("sinks", sink_map),
        ("by_position", received_by_position),
        ("rhythm", rhythm),
        ("thumbnails", thumbnails),
    ]
    figures = [make(overview[name]) for name, make in makers if overview.get(name)]
    for figure in figures:
        figure.show()
    return figures
