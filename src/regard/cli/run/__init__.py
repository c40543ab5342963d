"""regard run METHOD: one input with and without a method, side by side.

Every command is derived: from the kind of input that the method's card names and its settings, or
from a `command.py` in the method's folder where it takes something of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from regard import catalog
from regard.cli.derive import flat


def runner(kind: str) -> Callable[..., Any] | None:
    """What runs a method on one kind of input; None where there is none for it."""
    if kind == "text":
        from regard.cli.run.text import text

        return text
    if kind == "picture":
        from regard.cli.run.picture import picture

        return picture
    if kind in ("tokens", "answer"):
        from regard.cli.run import measure

        return measure.tokens if kind == "tokens" else measure.answered
    return None


def derived(method: catalog.Method) -> Callable[..., Any] | None:
    """`regard run SLUG`, derived from the method's card; None where no kind of input fits."""
    plain = runner(method.takes)
    if plain is None or not method.has("method"):
        return None
    make = Making(method)
    command = flat(plain, {"model": method.model}, method=(method.settings, make))
    shown = inspect.cleandoc(plain.__doc__ or "")
    command.__doc__ = f"{method.name}: {method.does}.\n\n{shown}"
    command.__doc__ = with_examples(command, method.examples)
    return command


class Making:
    """Makes the method from the options, when the command runs; the card is at hand before."""

    def __init__(self, method: catalog.Method) -> None:
        self.method = method

    def __call__(self, **settings: Any) -> Any:
        run = self.method.run
        if not isinstance(run, type):  # a function that measures: its settings are kept for it
            assert self.method.settings is not None
            run = partial(partial, run)
            settings = self.method.settings(**settings).settings()
        made = run(**settings)
        made.card = self.method
        return made


def with_examples(command: Callable[..., Any], examples: Sequence[str]) -> str:
    """The help of a command, the card's examples at its end."""
    help = inspect.cleandoc(command.__doc__ or "")
    shown = ["[bold]Examples[/]", *(f"  {e}" for e in examples)] if examples else []
    return "\n\n".join([help, *shown])
