"""What the methods that answer a prompt print: both answers, and their figures side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.common import err, write_json

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, Sequence[float], Callable[[float], str], int]
"""A name, the figure without and with the method, how it is written, digits of their ratio."""


def finish(result: Mapping[str, Any], json: Path | None, show: Callable[[Any], None]) -> None:
    """Write the result where it is asked for, show it unless it went to stdout, and its notes."""
    write_json(result, json)
    if str(json) != "-":
        show(result)
    for note in result["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)


def answers(console: Console, named: Mapping[str, str]) -> None:
    """Print answers side by side, each under its name."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in named:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, named.values()))
    console.print(table)


def parted(apart: int | Mapping[str, Any] | None) -> str:
    """Where answers part, in words: a token, or what `parting` gives.

    >>> parted(None), parted(2)
    ('The answers are the same.', 'They part at token 3.')
    >>> parted({"token": 0, "plain": "No", "steered": "Yes"})
    "They part at token 1: 'No' became 'Yes'."
    """
    token, *said = apart.values() if isinstance(apart, Mapping) else [apart]
    if token is None:
        return "The answers are the same."
    return f"They part at token {token + 1}{': {!r} became {!r}'.format(*said) if said else ''}."


def speeds(full: Mapping[str, Any], short: Mapping[str, Any]) -> Iterable[Row]:
    """The rows of two timed answers, for `figures`."""
    rates, seconds = (
        [x[k] for x in (full, short)] for k in ("tokens_per_second", "prefill_seconds")
    )
    if all(rates):
        yield "tokens/s after the first", rates, "{:.1f}".format, 2
    yield "seconds to the first", seconds, "{:.2f}".format, 2


def figures(console: Console, names: Sequence[str], rows: Iterable[Row]) -> None:
    """Print figures without and with a method, and their ratio; `names` are of these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, (full, short), written, digits in rows:
        table.add_row(name, written(full), written(short), f"{short / full:.{digits}f}")
    console.print(table)
