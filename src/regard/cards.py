"""What a method says of itself: its card, and the settings that a person can turn.

A `card.py` holds a `CARD` and, where there is something to set, a dataclass of `Settings`. It
imports nothing heavy: everything that lists methods reads cards, and loads no model library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from regard.errors import InputError, nearest

VERBS: dict[str, str] = {
    "see": "exact facts and pictures of attention at any length",
    "steer": "better answers or images from the same weights, no training",
    "shrink": "the same answers with less memory and time",
    "shape": "new attention, trained: layers, losses, heads, models",
    "bench": "which kernel, mask and parallel scheme is fastest here",
}
"""The verbs, and what a person gets from each."""

DIGITS = 18  # of a whole number as typed: what 64 bits hold
HUGE = 2.0**63  # numbers stay below
MOST = 1_000_000  # numbers of a list as typed


@dataclass(frozen=True)
class Paper:
    """The paper of a method; `arxiv` is its number there.

    >>> Paper("Title", "A et al.", 2024, "2401.00001").url
    'https://arxiv.org/abs/2401.00001'
    """

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """The address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Card:
    """One method, as every list, command, page and test knows it.

    Attributes:
        slug: its name on the command line; the folder has the same name, with underscores.
        verb: one of `VERBS`.
        does: one line of what a person gets.
        families: the kinds of models it is for.
        method: the class or function in `method.py` that runs it; None while it is planned.
        exports: further names to import from `regard`; "heads.HeadFilter" lies in `heads.py`.
        takes: the kind of input that `regard run` and `regard trial` give it: "text", "picture",
            "prompt" (of an image), "tokens" (of a text, to measure), "answer" (to a prompt, to
            measure); "" where it has a command of its own or none.
        plain_prompt: whether the pass over a prompt is that of the plain model.
        neutral: settings under which it changes nothing.
        example: settings that suit a tiny model, for the tests.
        examples: commands that a person may type, for the help.
        model: the model that commands take when none is named.
        command: a command of its own beside the groups: `regard explain`.
        baseline: a published rule to compare with, not one of the catalogue's methods.
    """

    slug: str
    name: str
    verb: str
    does: str
    paper: Paper
    families: tuple[str, ...]
    method: str | None = None
    exports: tuple[str, ...] = ()
    takes: str = ""
    plain_prompt: bool = False
    neutral: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    model: str = "smollm2-135m"
    command: str = ""
    baseline: bool = False


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    to: float | None = None,
    below: float | None = None,
    among: Iterable[str] | None = None,
    whole: bool | None = None,
    odd: bool = False,
    function: bool = False,
    excludes: str | None = None,
    needs: str | None = None,
    option: str | None = None,
    kind: Any = None,
    alias: str | None = None,
    hidden: bool = False,
) -> Any:
    """A field of `Settings`: its default, one line of help, and what it may be.

    Args:
        least, above, to, below: the range of a number; `above` and `below` leave the bound out.
        among: the words it may be.
        whole: only whole numbers; known from the default where that is a number.
        odd: a whole number with a middle.
        function: a function may take the place of one of the words.
        excludes, needs: another setting that cannot, or must, be given with it on the command line.
        option: its name on the command line, "" for none; derived from the field's name if None.
        kind: what the command line takes, where that is not the field's own type.
        alias: an older name of the option, still read.
        hidden: an older setting, still read: not in the help, and not in `settings()`.
    """
    given = {n: v for n, v in locals().items() if n not in ("default", "among")}
    given["among"] = None if among is None else tuple(among)
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=given)
    return field(default=default, metadata=given)


def whole_or_all(text: str | int) -> int | None:
    """A whole number as typed; 0, "all" and "none" are no limit.

    >>> whole_or_all("12"), whole_or_all("all")
    (12, None)
    """
    word = str(text).strip().lower()
    if word in ("0", "all", "none"):
        return None
    if not word.isdecimal() or len(word) > DIGITS:
        raise InputError(f"{str(text)[:40]!r} is neither a whole number nor 0 for all")
    return int(word)


def whole_numbers(text: Any) -> tuple[int, ...]:
    """Whole numbers as typed, with commas or slashes between them, and ranges.

    >>> whole_numbers("0,3,5-7"), whole_numbers("2/1")
    ((0, 3, 5, 6, 7), (2, 1))
    """
    if not isinstance(text, str):
        return tuple(text)
    numbers: list[int] = []
    for piece in text.replace("/", ",").split(","):
        first, dash, last = piece.strip().partition("-")
        last = last if dash else first
        right = first.isdecimal() and last.isdecimal() and len(first + last) <= 2 * DIGITS
        if not right or int(first) > int(last):
            raise InputError(f"{text[:40]!r} is no list of whole numbers such as 0,3,5-7")
        if len(numbers) + int(last) - int(first) >= MOST:
            raise InputError(f"{text[:40]!r} is more than {MOST:,} numbers: give fewer")
        numbers += range(int(first), int(last) + 1)
    return tuple(numbers)


class Checked:
    """Base of the settings' dataclasses: every value is checked when the object is made.

    >>> @dataclass(eq=False)
    ... class Example(Checked):
    ...     ratio: float = setting(0.5, "share kept", above=0, to=1)
    >>> Example(ratio=2)
    Traceback (most recent call last):
    ...
    regard.errors.InputError: ratio is a number above 0 and at most 1, not 2: share kept
    """

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            if one.metadata:
                check(one.name, getattr(self, one.name), one)
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def settings(self) -> dict[str, Any]:
        """The settings by name: what `type(self)(**settings)` makes again."""
        shown = [f.name for f in fields(self) if f.metadata and not f.metadata["hidden"]]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in shown}


def check(name: str, value: Any, one: Any) -> None:
    """Refuse a value outside of what its field says it may be."""
    rule = one.metadata
    default = None if one.default is MISSING else one.default
    if value is None and (default is None or "None" in str(one.type)):
        return
    among = rule.get("among")
    if among is not None:
        if value not in among and not (rule.get("function") and callable(value)):
            hint = nearest(value, among) if isinstance(value, str) and len(among) > 1 else ""
            raise InputError(f"{name} is one of {', '.join(among)}, not {_shown(value)}.{hint}")
        return
    bounds = {n: rule.get(n) for n in ("above", "least", "below", "to")}
    numeric = any(b is not None for b in bounds.values()) or isinstance(default, (int, float))
    if not numeric or isinstance(default, bool):
        return
    whole = rule.get("whole")
    whole = isinstance(default, int) if whole is None else whole
    right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    right = right and -HUGE < value < HUGE  # NaN is not
    right = right and (bounds["above"] is None or value > bounds["above"])
    right = right and (bounds["least"] is None or value >= bounds["least"])
    right = right and (bounds["below"] is None or value < bounds["below"])
    right = right and (bounds["to"] is None or value <= bounds["to"])
    if not right or (rule.get("odd") and value % 2 == 0):
        raise InputError(f"{name} is {allowed(one)}, not {_shown(value)}: {rule['help']}")


def _shown(value: Any) -> str:
    """A value in an error: no more of it than a person reads."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def allowed(one: Any) -> str:
    """What a number may be, in words."""
    rule = one.metadata
    whole = rule.get("whole")
    whole = isinstance(one.default, int) if whole is None else whole
    kind = "an odd whole number" if rule.get("odd") else "a whole number" if whole else "a number"
    return f"{kind} {bounds_of(one)}".strip()


def bounds_of(one: Any) -> str:
    """The range of a number, in words; "" where it has none."""
    words = {"above": "above", "least": "of at least", "below": "below", "to": "at most"}
    said = [f"{w} {one.metadata[n]:g}" for n, w in words.items() if one.metadata[n] is not None]
    return " and ".join(said)


@dataclass(eq=False)
class Budget(Checked):
    """Rows of the prompt that every key head keeps: `budget` of them, or the share `ratio`."""

    budget: int | None = setting(
        None, "rows kept of the prompt", least=1, excludes="ratio", whole=True
    )
    ratio: float | None = setting(None, "share of the prompt's rows kept", above=0, to=1)

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.ratio is None):
            raise InputError("give either budget (rows) or ratio (share of the prompt)")
        super().__post_init__()

    def rows(self, tokens: int) -> int:
        """How many rows each head keeps of a prompt of so many tokens."""
        if self.budget is not None:
            return min(self.budget, tokens)
        return max(1, math.floor((self.ratio or 1) * tokens + 1e-9))
