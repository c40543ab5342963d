"""Where an overview goes: to the terminal, to JSON, and to a page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from regard.cli.common import check_file, check_output, err, write_json
from regard.errors import InputError


def command() -> str:
    """What was typed."""
    return shlex.join(["regard", *sys.argv[1:]])


def check_outputs(html: Path | None, json: Path | None, *files: Path | None) -> None:
    """Refuse, before any work is done, what could not be written or drawn in the end.

    Raises:
        InputError: a place that cannot be written to, or one place for two.
        ImportError: a page without plotly; names the extra.
    """
    check_places(json, html, *files)
    if html is not None:
        from regard.report.figures import plotly

        plotly()


def check_places(json: Path | None, *files: Path | None) -> None:
    """Refuse places that cannot be written to; JSON alone may go to stdout."""
    for path in files:
        check_file(path)
    check_output(json)


def check_png(path: Path | None, option: str = "--out") -> None:
    """Refuse another ending for what is written as PNG."""
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"{option} is a .png file, not {path}")


def deliver(
    view: dict[str, Any],
    notes: Iterable[str],
    *,
    show: Callable[[dict[str, Any]], None],
    write_page: Callable[[dict[str, Any], Path], Path],
    json: Path | None,
    html: Path | None,
) -> None:
    """Show an overview on the terminal, and write what was asked for.

    Where JSON goes to stdout nothing else does: the notes go to stderr.
    """
    if json is None or str(json) != "-":
        show(view)
    else:
        for note in notes:
            err().print(f"note: {note}", markup=False, highlight=False)
    write_json(view, json)
    if html is not None:
        err().print(f"report: {write_page(view, html)}", markup=False, highlight=False)
