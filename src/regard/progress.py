"""The progress bar of everything that runs for longer than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int, label: str, show: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal; yields what to call after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from regard.report.screen import Console

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    hidden = not (show and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden) as shown:
        task = shown.add_task(label, total=total)
        yield lambda: shown.advance(task)
