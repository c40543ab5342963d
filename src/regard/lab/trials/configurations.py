"""Configurations of a trial, written as a line of text: which methods run, with which settings.

What a method can be set to is read from its card: a line is checked before anything is loaded.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from regard import catalog
from regard.cards import Checked
from regard.errors import InputError, nearest
from regard.lab.fingerprint import fingerprint

if TYPE_CHECKING:
    from regard.reach import Handler

FULL = "full"
BUDGETS = {"ratio", "budget"}
_WORDS = {"true": True, "false": False, "none": None}


def known() -> dict[str, catalog.Method]:
    """What a configuration may be made of, by slug."""
    ready = [m for m in catalog.everything() if m.card.takes in ("text", "picture")]
    return {m.card.slug: m for m in ready if m.has("method")}


@dataclass(frozen=True)
class Part:
    """A method with the settings that were written down."""

    method: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def entry(self) -> catalog.Method:
        """The method in the catalogue."""
        return known()[self.method]

    def takes_budget(self) -> bool:
        """Whether an equal budget can be set from outside: it has one, and none was written, nor
        a setting that takes its place.
        """
        kinds, given = _kinds(self.entry), dict(self.settings)
        if not BUDGETS & {*kinds} or BUDGETS & {*given}:
            return False
        whole: dict[str, Any] = {"ratio": 1.0} if "ratio" in kinds else {"budget": 1}
        settings = self.entry.settings
        return settings is None or not (
            _accepts(settings, given) and not _accepts(settings, {**given, **whole})
        )

    def given(self, tokens: int, ratio: float | None, budget: int | None) -> dict[str, Any]:
        """The settings for a prompt of so many tokens."""
        given = dict(self.settings)
        if self.takes_budget():
            has = _kinds(self.entry)
            if ratio is not None and "ratio" in has:
                given["ratio"] = ratio
            elif ratio is not None:
                given["budget"] = max(1, math.floor(ratio * tokens + 1e-9))
            elif budget is not None and "budget" in has:
                given["budget"] = budget
            elif budget is not None:
                given["ratio"] = min(1.0, budget / max(tokens, 1))
        return given

    def check(self, ratio: float | None, budget: int | None) -> None:
        """Refuse a value that the method's settings do not take."""
        if self.entry.settings is not None:
            self.entry.settings(**self.given(1000, ratio, budget))

    def make(self, tokens: int, ratio: float | None, budget: int | None) -> Handler:
        """The method, made for a prompt of so many tokens."""
        given = self.given(tokens, ratio, budget)
        try:
            handler: Handler = self.entry.run(**given)
        except TypeError as problem:  # a word where a number belongs, a setting left out
            raise InputError(f"{self.method} cannot be made with {given}: {problem}") from None
        return handler


@dataclass(frozen=True)
class Configuration:
    """Methods under the name that the user wrote; none for the plain model.

    Attributes:
        ratio: share of the prompt's rows, for every method that takes a budget and states none.
        budget: the same as a number of rows.
    """

    name: str
    parts: tuple[Part, ...] = ()
    ratio: float | None = None
    budget: int | None = None

    @property
    def key(self) -> str:
        """The name, and the budget where one was set from outside.

        >>> read("act,snapkv", ratios=[0.5])[2].key
        'snapkv@0.5'
        """
        if self.ratio is not None:
            return f"{self.name}@{self.ratio:g}"
        return self.name if self.budget is None else f"{self.name}@{self.budget} rows"

    def handlers(self, tokens: int) -> list[Handler]:
        """The methods, made anew: what one remembers of a text does not reach the next.

        Args:
            tokens: length of the prompt, which a budget may depend on.

        Raises:
            InputError: a value that a method refuses.
        """
        return [part.make(tokens, self.ratio, self.budget) for part in self.parts]

    @property
    def plain_prompt(self) -> bool:
        """Whether the pass over a prompt is that of the plain model."""
        return bool(self.parts) and all(p.entry.card.plain_prompt for p in self.parts)

    @cached_property
    def source(self) -> str:
        """The fingerprint of the methods' code; empty for the plain model."""
        modules = [f"{p.entry.package}.method" for p in self.parts]
        return fingerprint(*modules) if modules else ""


def read(
    given: str | None, *, ratios: Sequence[float] = (), budget: int | None = None
) -> list[Configuration]:
    """The configurations of a line such as "act,task-kv:ratio=0.4,sinks=4", the plain model first.

    Commas separate configurations; after a colon come settings, `key=value`, with commas between
    them as well; `+` joins methods that run together. Values are numbers, true, false, none, words,
    or whole numbers joined by slashes (2/1 is the pair 2, 1).

    Args:
        ratios: the budgets, as shares of the prompt, for every method that has a budget and states
            none; such a configuration comes once for each.
        budget: the same as a number of rows, instead.

    >>> [c.key for c in read("task-kv:ratio=0.4,sinks=4, act:beta=0.2+h2o, full", ratios=[0.5])]
    ['full', 'task-kv:ratio=0.4,sinks=4', 'act:beta=0.2+h2o@0.5']
    >>> read("act:skip_layers=0/0")[1].handlers(100)[0].skip_layers
    (0, 0)

    Raises:
        InputError: an unknown name or setting, a value out of range, one configuration twice, one
            method twice in it, both kinds of budget.
    """
    if ratios and budget is not None:
        raise InputError("ratio and budget are mutually exclusive")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"a ratio is the share of the prompt that is kept, not {ratio:g}")
    if budget is not None and budget < 1:
        raise InputError(f"a budget is a number of rows from 1 on, not {budget}")
    configurations = {FULL: Configuration(FULL)}
    for name in _names(given or ""):
        if name == FULL:
            continue
        parts = tuple(_part(piece, name) for piece in name.split("+"))
        methods = [part.method for part in parts]
        for method in methods:
            if methods.count(method) > 1:
                # the second would reckon with attention that the first has changed
                raise InputError(f"{name!r} applies {method} twice: name it once")
        free = any(p.takes_budget() for p in parts)
        every: list[float | None] = [*dict.fromkeys(ratios)] if free and ratios else [None]
        for share in every:
            configuration = Configuration(name, parts, share, budget if free else None)
            if configuration.key in configurations:
                raise InputError(f"the configuration {name!r} is given twice: take one out")
            configurations[configuration.key] = configuration
    for configuration in configurations.values():
        for part in configuration.parts:
            part.check(configuration.ratio, configuration.budget)
    return list(configurations.values())


def _names(text: str) -> list[str]:
    """
    >>> _names("act, h2o:ratio=0.5,recent=0.2 ,snapkv:pool=3,window=8+act,full")
    ['act', 'h2o:ratio=0.5,recent=0.2', 'snapkv:pool=3,window=8+act', 'full']
    """
    names: list[str] = []
    for piece in ("".join(p.split()) for p in text.split(",")):
        if names and re.match(r"[^:+]*=", piece):  # one more setting of the method before it
            names[-1] += f",{piece}"
        elif piece:
            names.append(piece)
    return names


def _part(piece: str, whole: str) -> Part:
    name, colon, rest = piece.partition(":")
    methods = known()
    if name not in methods:
        raise InputError(
            f"there is no method {name!r} to make {whole!r} of.{nearest(name, methods)}"
        )
    kinds, settings = _kinds(methods[name]), dict[str, Any]()
    for item in rest.split(",") if colon else []:
        key, equals, value = item.partition("=")
        if not key or not equals or not value:
            raise InputError(f"{piece!r} is not written as {name}:setting=value,setting=value")
        key = key.replace("-", "_")
        if key not in kinds:
            raise InputError(f"{name} has no setting {key!r}.{nearest(key, kinds)}")
        if key in settings:
            raise InputError(f"{piece!r} gives {key} twice: take one out")
        settings[key] = _value(value, kinds[key])
    return Part(name, tuple(settings.items()))


def _kinds(method: catalog.Method) -> dict[str, Callable[[str], Any] | None]:
    """The settings of a method, each with what reads it from text, None for the common way."""
    if method.settings is None:
        return dict.fromkeys(inspect.signature(method.run).parameters)
    settings = [f for f in fields(method.settings) if f.metadata]  # type: ignore[arg-type]
    kinds = {f.name: f.metadata["kind"] for f in settings}
    return {n: None if isinstance(k, type) else k for n, k in kinds.items()}


def _accepts(settings: type[Checked], given: dict[str, Any]) -> bool:
    try:
        settings(**given)
    except InputError:
        return False
    return True


def _value(text: str, kind: Callable[[str], Any] | None = None) -> Any:
    """
    >>> [_value(t) for t in ("4", "0.4", "1e-3", "2/1", "true", "none", "heads.json")]
    [4, 0.4, 0.001, (2, 1), True, None, 'heads.json']
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if kind is not None:
        return kind(text)
    if re.fullmatch(r"\d+(/\d+)+", text):
        return tuple(map(int, text.split("/")))
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def with_setting(given: str, name: str, value: str) -> str:
    """The line with one more setting for every method that has it and states no settings.

    >>> with_setting("act+h2o,act:beta=1", "heads", "h.json")
    'act:heads=h.json+h2o,act:beta=1'

    Raises:
        InputError: no such method in the line, or a value that a line cannot hold.
    """
    if any(c in value for c in ",+:="):
        raise InputError(f"{value}: a comma, plus, colon or equals sign in its name: rename it")
    takers = [slug for slug, method in known().items() if name in _kinds(method)]
    lines = [[part.strip() for part in piece.split("+")] for piece in given.split(",")]
    if not any(part in takers for parts in lines for part in parts):
        raise InputError(
            f"--{name} goes with {' or '.join(takers)}: name it in --with, or write "
            f"{takers[0]}:{name}=... there yourself"
        )
    return ",".join(
        "+".join(f"{part}:{name}={value}" if part in takers else part for part in parts)
        for parts in lines
    )
