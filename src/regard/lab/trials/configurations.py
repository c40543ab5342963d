"""Configurations of a trial, written as a line of text: which methods run, with which settings."""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from regard.errors import InputError, nearest
from regard.reach import Handler

FULL = "full"
PLAIN_PROMPT = ("task-kv", "recycled-attention", "streaming-llm", "snapkv", "h2o", "random")
"""Methods that leave the pass over the prompt as it is, and only keep other rows of it."""
METHODS = {
    "act": ("regard.steer", "ACT"),
    "task-kv": ("regard.shrink", "TaskKV"),
    "recycled-attention": ("regard.shrink", "Recycled"),
    "streaming-llm": ("regard.shrink", "StreamingLLM"),
    "snapkv": ("regard.shrink", "SnapKV"),
    "h2o": ("regard.shrink", "H2O"),
    "random": ("regard.shrink", "RandomEviction"),
    "var": ("regard.steer", "VAR"),
    "visiondrop": ("regard.shrink", "VisionDrop"),
}
"""What a configuration may be made of: name -> where the class lies; imported when asked for."""

_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Part:
    """A method with the settings that were written down."""

    method: str
    settings: tuple[tuple[str, Any], ...] = ()

    def takes_budget(self) -> bool:
        """Whether an equal budget can be set from outside: it has one, and none was written."""
        has, given = _parameters(self.method), {key for key, _ in self.settings}
        own = {"ratio", "budget", "tokens", "cuts", "encoder"}
        return bool({"ratio", "budget"} & set(has)) and not own & given

    def make(self, tokens: int, ratio: float | None, budget: int | None) -> Handler:
        """The method, made for a prompt of so many tokens."""
        given = dict(self.settings)
        if self.takes_budget():
            has = _parameters(self.method)
            if ratio is not None and "ratio" in has:
                given["ratio"] = ratio
            elif ratio is not None:
                given["budget"] = max(1, math.floor(ratio * tokens + 1e-9))
            elif budget is not None and "budget" in has:
                given["budget"] = budget
            elif budget is not None:
                given["ratio"] = min(1.0, budget / max(tokens, 1))
        try:
            made: Handler = _class(self.method)(**given)
        except TypeError as problem:  # a word where a number belongs, a setting left out
            raise InputError(f"{self.method} cannot be made with {given}: {problem}") from None
        return made


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
        return bool(self.parts) and all(p.method in PLAIN_PROMPT for p in self.parts)

    @property
    def source(self) -> str:
        """Twelve digits that change with the methods' files, and those they import beside them."""
        mark = hashlib.sha256()
        files = {f for p in self.parts for f in _files(Path(inspect.getfile(_class(p.method))))}
        for path in sorted(files):
            mark.update(path.read_bytes())
        return mark.hexdigest()[:12] if self.parts else ""


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
        InputError: an unknown name or setting, one configuration twice, one method twice in it, a
            budget out of range, both kinds of budget.
    """
    if ratios and budget is not None:
        raise InputError("a budget is given as a ratio or as a number of rows: give one of them")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"a ratio is the share of the prompt that is kept, not {ratio:g}")
    if budget is not None and budget < 1:
        raise InputError(f"a budget is a number of rows from 1 on, not {budget}")
    found = {FULL: Configuration(FULL)}
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
            one = Configuration(name, parts, share, budget if free else None)
            if one.key in found:
                raise InputError(f"the configuration {name!r} is given twice: take one out")
            found[one.key] = one
    return list(found.values())


def _names(text: str) -> list[str]:
    """
    >>> _names("act, h2o:ratio=0.5,recent=0.2 ,snapkv:pool=3,window=8+act,full")
    ['act', 'h2o:ratio=0.5,recent=0.2', 'snapkv:pool=3,window=8+act', 'full']
    """
    found: list[str] = []
    for piece in ("".join(p.split()) for p in text.split(",")):
        if found and re.match(r"[^:+]*=", piece):  # one more setting of the method before it
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return found


def _part(piece: str, whole: str) -> Part:
    name, colon, rest = piece.partition(":")
    if name not in METHODS:
        raise InputError(
            f"there is no method {name!r} to make {whole!r} of.{nearest(name, METHODS)}"
        )
    settings: dict[str, Any] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = item.partition("=")
        if not key or not equals or not value:
            raise InputError(f"{piece!r} is not written as {name}:setting=value,setting=value")
        key = key.replace("-", "_")
        if key not in _parameters(name):
            raise InputError(f"{name} has no setting {key!r}.{nearest(key, _parameters(name))}")
        if key in settings:
            raise InputError(f"{piece!r} gives {key} twice: take one out")
        settings[key] = _value(value)
    return Part(name, tuple(settings.items()))


def _value(text: str) -> Any:
    """
    >>> [_value(t) for t in ("4", "0.4", "1e-3", "2/1", "true", "none", "heads.json")]
    [4, 0.4, 0.001, (2, 1), True, None, 'heads.json']
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"\d+(/\d+)+", text):
        return tuple(map(int, text.split("/")))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _files(module: Path) -> set[Path]:
    """A file, and those beside it that it imports."""
    found, todo = set[Path](), [module]
    while todo:
        path = todo.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                beside = path.with_name(f"{node.module.split('.')[0]}.py")
                todo += [beside] if beside.is_file() and beside not in found else []
    return found


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(_class(name)).parameters)


def _class(name: str) -> Any:
    module, found = METHODS[name]
    try:
        return getattr(import_module(module), found)
    except (ImportError, AttributeError):
        raise InputError(f"{name} is not part of this installation: leave it out") from None
