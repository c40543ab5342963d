"""Errors a user can cause, each with one sentence that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegardError(Exception):
    """Base of every error that the user, not regard, can put right; the command line exits with 2.

    >>> issubclass(InputError, RegardError) and issubclass(InputError, ValueError)
    True
    """


class InputError(RegardError, ValueError):
    """A value that was passed in cannot be used: a name, a path, a number out of range."""


class ReachError(RegardError):
    """A model, or one of its attention layers, has no door that regard can use."""


class NeedsMatrix(RegardError):
    """A request needs the full query x key matrix; the message says how large it is."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the hint to append to an error about an unknown name.

    One close match gives a question, otherwise the choices are listed.

    >>> nearest("entrpy", ["entropy", "received"])
    " Did you mean 'entropy'?"
    >>> nearest("zzz", ["entropy", "received"])
    ' Choose from: entropy, received.'
    """
    known = sorted(set(choices))
    if not known:
        return ""
    folded = {choice.casefold(): choice for choice in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    if close:
        return f" Did you mean {folded[close[0]]!r}?"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f" Choose from: {shown}."


def plain(text: str) -> str:
    """A text without what a terminal would obey: control and direction characters are spelt out.

    >>> plain("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _SHOWN else repr(c)[1:-1] for c in text)


_SHOWN = "\n\u00a0\u202f\u200c\u200d\u3000"  # blanks, and what joins letters of some scripts
