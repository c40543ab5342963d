"""Figures and the self-contained HTML page, drawn from one plain dictionary, the overview.

This package imports no other part of regard: whoever measures hands over an overview, and
notebooks, the page and the studio share the figures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "page" if name.endswith("_page") else "figures"
        return getattr(import_module(f"regard.report.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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

    from regard.report import figures as drawn

    view = (overview.get("views") or {}).get("received")
    if view:
        display(HTML(drawn.tokens_html(overview["tokens"], view, overview.get("marks"))))
    makers: list[tuple[str, Any]] = [
        ("sinks", drawn.sink_map),
        ("by_position", drawn.received_by_position),
        ("rhythm", drawn.rhythm),
        ("thumbnails", drawn.thumbnails),
    ]
    figures = [make(overview[name]) for name, make in makers if overview.get(name)]
    for figure in figures:
        figure.show()
    return figures
