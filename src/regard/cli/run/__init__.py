"""regard run METHOD: one input with and without a method, side by side.

Every command is derived: from the kind of input that the method's card names and its settings, or
from a `command.py` in the method's folder where it takes something of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import cleandoc
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
    command.__doc__ = explained(method, plain)
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


def explained(method: catalog.Method, plain: Callable[..., Any]) -> str:
    """The help of a derived command: what the method does, what is shown, examples."""
    lines = [f"{method.name}: {method.does}.", cleandoc(plain.__doc__ or "")]
    if method.examples:
        lines += ["[bold]Examples[/]", *(f"  {e}" for e in method.examples)]
    return "\n\n".join(lines)
