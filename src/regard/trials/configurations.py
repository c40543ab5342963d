"""Configurations of a trial, written as a line of text: which methods run, with which settings."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from regard.errors import InputError, nearest
from regard.reach import Handler

FULL = "full"
_CLASSES = {
    "act": ("regard.steer.act", "ACT"),
    "task-kv": ("regard.shrink.task_kv", "TaskKV"),
    "recycled-attention": ("regard.shrink.recycled_attention", "Recycled"),
    "streaming-llm": ("regard.shrink.eviction", "StreamingLLM"),
    "snapkv": ("regard.shrink.eviction", "SnapKV"),
    "h2o": ("regard.shrink.eviction", "H2O"),
    "random-eviction": ("regard.shrink.eviction", "RandomEviction"),
}


def known() -> list[str]:
    """The names a configuration may use.

    >>> "full" in known() and "act" in known()
    True
    """
    return [FULL, *(name for name, (module, _) in _CLASSES.items() if _exists(module))]


@dataclass(frozen=True)
class Configuration:
    """Methods with their settings, under the name the user wrote; none for the plain model."""

    name: str
    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def handlers(self) -> list[Handler]:
        """The methods, made anew: what one remembers of a sample does not reach the next.

        Raises:
            InputError: a setting that the method does not have, or not with this value.
        """
        return [_make(name, dict(settings)) for name, settings in self.parts]

    @property
    def source(self) -> str:
        """Twelve digits that change when the code of the methods does."""
        mark = hashlib.sha256()
        for name, _ in self.parts:
            mark.update(Path(inspect.getfile(_class(name))).read_bytes())
        return mark.hexdigest()[:12] if self.parts else ""


def read(given: str | None) -> list[Configuration]:
    """The configurations of a line such as "act,task-kv:ratio=0.4;sinks=4", the plain model first.

    Commas separate configurations, `+` joins methods that run together, and after a colon come
    settings, `key=value`, separated by semicolons. Values are numbers, true, false, none, words, or
    whole numbers joined by slashes (2/1 is the pair 2, 1).

    >>> [c.name for c in read("act:beta=0.2;skip_layers=0/0, full")]
    ['full', 'act:beta=0.2;skip_layers=0/0']
    >>> read("act:beta=0.2")[1].handlers()[0].beta
    0.2

    Raises:
        InputError: an unknown name or setting, a value that the method refuses, one twice.
    """
    found = {FULL: Configuration(FULL)}
    for text in (given or "").split(","):
        name = "".join(text.split())
        if not name or name == FULL:
            continue
        if name in found:
            raise InputError(f"the configuration {name!r} is given twice: take one out")
        found[name] = Configuration(name, tuple(_part(piece, name) for piece in name.split("+")))
        found[name].handlers()
    return list(found.values())


def _part(piece: str, whole: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    name, _, settings = piece.partition(":")
    if name not in known() or name == FULL:
        raise InputError(
            f"there is no method {name!r} to make {whole!r} of.{nearest(name, known()[1:])}"
        )
    return name, tuple(_settings(settings, name))


def _settings(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for item in filter(None, text.split(";")):
        key, equals, value = item.partition("=")
        if not key or not equals or not value:
            raise InputError(f"{name}:{text} is not name:key=value;key=value")
        yield key.replace("-", "_"), _value(value)


def _value(text: str) -> Any:
    """
    >>> [_value(t) for t in ("4", "0.4", "1e-3", "2/1", "true", "none", "heads.json")]
    [4, 0.4, 0.001, (2, 1), True, None, 'heads.json']
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"\d+(/\d+)+", text):
        return tuple(map(int, text.split("/")))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _make(name: str, settings: dict[str, Any]) -> Handler:
    made = _class(name)
    allowed = list(inspect.signature(made).parameters)
    for key in settings:
        if key not in allowed:
            raise InputError(f"{name} has no setting {key!r}.{nearest(key, allowed)}")
    try:
        return made(**settings)
    except TypeError as problem:  # a word where a number belongs, a setting left out
        raise InputError(f"{name} cannot be made with {settings}: {problem}") from None


def _class(name: str) -> Any:
    module, found = _CLASSES[name]
    return getattr(import_module(module), found)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False
