"""Commands from dataclasses: a parameter that is annotated with `Settings` becomes its options.

`flat` turns a function into one that typer can read. A method's command is such a function: it is
written once for a kind of input, and takes the method's settings from its card.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from regard.cards import Checked, bounds_of
from regard.errors import InputError
from regard.files import check_outputs

PANELS = {"Settings": "Settings of the method", "Loading": "Loading"}
WRITTEN = ("FILE", "FILE|-", "FOLDER")  # metavars of outputs; "-" is stdout
_PLAIN = (bool, int, float, str, Path)


def flat(
    function: Callable[..., Any], defaults: dict[str, Any] | None = None, **kinds: Any
) -> Callable[..., Any]:
    """The function with one option for each field of its parameters that are `Settings`.

    Args:
        defaults: other defaults than those of the function and of the settings.
        kinds: the class of a parameter, in place of its annotation; a pair (class, make) gives the
            function `make(**settings)` in place of an object of the class.

    >>> from dataclasses import dataclass
    >>> from regard.cards import setting
    >>> @dataclass(eq=False)
    ... class Cut(Checked):
    ...     ratio: float = setting(0.5, "share kept", above=0, to=1)
    >>> def run(cut: Cut, model: str = "tiny") -> None: ...
    >>> list(inspect.signature(flat(run)).parameters)
    ['ctx', 'model', 'ratio']
    """
    hints = get_type_hints(function, include_extras=True)
    plain, options, groups = [], [], {}
    taken: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        kind = kinds.get(parameter.name, hints.get(parameter.name))
        kind, make = kind if isinstance(kind, tuple) else (kind, kind)
        if isinstance(kind, type) and issubclass(kind, Checked):
            own = [f for f in fields(kind) if f.metadata and f.metadata["option"] != ""]  # type: ignore[arg-type]
            groups[parameter.name] = (make, own)
            taken |= {_word(f) for f in own}
            panel = PANELS.get(kind.__name__)
            options += [_parameter(f, kind, panel, defaults or {}) for f in own]
        elif kind is None and parameter.name in kinds:
            groups[parameter.name] = (make, [])
        else:
            default = (defaults or {}).get(parameter.name, parameter.default)
            plain.append(parameter.replace(annotation=kind, default=default))
    if not groups:
        return function
    asking = [p.name for p in plain if p.annotation is typer.Context]
    plain = [p for p in plain if p.name not in asking]
    plain = [p.replace(annotation=_without(p.annotation, taken)) for p in plain]
    names = [p.name for p in (*plain, *options)]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{function.__name__} takes {', '.join(twice)} twice")
    order = {inspect.Parameter.empty: 0}
    shown = sorted([*plain, *options], key=lambda p: order.get(p.default, 1))

    @functools.wraps(function)
    def command(ctx: typer.Context, **given: Any) -> Any:
        for name, (make, own) in groups.items():
            values = {f.name: given.pop(f.name) for f in own}
            for field in own:
                if isinstance(values[field.name], InputError):
                    raise InputError(f"{_word(field)}: {values[field.name]}")
            _together(own, ctx)
            given[name] = make(
                **{n: v for n, v in values.items() if v is not None or _none(n, own)}
            )
        return function(**given, **dict.fromkeys(asking, ctx))

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_CONTEXT, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown)]
    )
    command.__annotations__ = {p.name: p.annotation for p in (_CONTEXT, *shown)}
    return command


class Commands(typer.Typer):
    """A group of commands whose functions may take `Settings`."""

    def __init__(self, help: str, **more: Any) -> None:
        super().__init__(help=help, no_args_is_help=True, rich_markup_mode="rich", **more)
        self.callback()(_nothing)

    def command(self, name: str | None = None, **more: Any) -> Callable[..., Any]:
        register = super().command(name, cls=Command, **more)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            register(flat(function) if not hasattr(function, "__signature__") else function)
            return function

        return add


class Command(TyperCommand):
    """A command that refuses, before any work, what no option of any command can mean."""

    def invoke(self, ctx: Any) -> Any:
        for one in self.params:
            given = ctx.params.get(str(one.name))
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if problem := _unusable(value):
                    word = one.opts[-1] if one.param_type_name == "option" else str(one.name)
                    raise InputError(f"{word} {problem}")
        self._check_outputs(ctx.params)
        return super().invoke(ctx)

    def _check_outputs(self, given: dict[str, Any]) -> None:
        """Every place that this command writes to: those whose metavar is one of `WRITTEN`."""
        kinds: dict[str, dict[str, Path]] = {kind: {} for kind in WRITTEN}
        inputs = []
        for one in self.params:
            value = given.get(str(one.name))
            if one.metavar in kinds:
                if isinstance(value, Path):
                    if str(value) == "-" and one.metavar == "FILE":
                        raise InputError(
                            f"{one.opts[-1]} is a file, not stdout: name one in place of -"
                        )
                    kinds[one.metavar][one.opts[-1]] = value
            elif isinstance(value, Path):
                inputs.append(value)
            elif isinstance(value, str) and value[:1] == "@" and len(value) < 4096:
                inputs.append(Path(value[1:]))
        check_outputs(kinds["FILE"] | kinds["FILE|-"], kinds["FOLDER"], inputs)


def _unusable(value: Any) -> str:
    """Why nobody can use a value, "" where somebody may.

    >>> _unusable(float("nan")), _unusable("words")
    ('is a finite number, not nan', '')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"is a finite number, not {value}"
    if isinstance(value, int) and value.bit_length() > 63:
        return f"is a number of at most 63 bits, not one of {value.bit_length()}"
    if isinstance(value, (str, Path)) and "\0" in str(value):
        return f"holds a zero byte: {str(value)[:40]!r}"
    if isinstance(value, str) and not value.isascii() and not os.path.exists(value):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"is not UTF-8: {value[:40]!r}"
    return ""


def _nothing() -> None:
    """A group with a callback keeps its name before a single command."""


_CONTEXT = inspect.Parameter(
    "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
)


def _none(name: str, own: list[Any]) -> bool:
    """Whether None is the field's own default, and not a list that nobody gave."""
    field = next(f for f in own if f.name == name)
    return field.default_factory is MISSING


def _word(field: Field[Any]) -> str:
    return "--" + (field.metadata["option"] or field.name.replace("_", "-"))


def _without(annotation: Any, taken: set[str]) -> Any:
    """The annotation of an option less those of its names that a setting has taken."""
    for info in getattr(annotation, "__metadata__", ()):
        names = getattr(info, "param_decls", None) or ()
        if taken & set(names):
            left = copy(info)
            left.param_decls = tuple(n for n in names if n not in taken)
            return Annotated[annotation.__origin__, left]
    return annotation


def _parameter(
    field: Field[Any], kind: type, panel: str | None, defaults: dict[str, Any]
) -> inspect.Parameter:
    rule = field.metadata
    default = field.default if field.default is not MISSING else None
    default = defaults.get(field.name, default)
    name = _word(field).removeprefix("--")
    help = _help(field)
    type_, parser = _type(field, kind)
    words = [f"--{name}"]
    if type_ is bool:
        words = [f"--{name}/--no-{name}"]
    if rule["alias"]:
        words.append(f"--{rule['alias']}")
    option: Any = typer.Option(
        *words, help=help, parser=parser, rich_help_panel=panel, hidden=rule["hidden"]
    )
    if default is None and type_ is not list[str]:
        type_ = type_ | None
    elif type_ is list[str]:
        type_ = list[str] | None
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[type_, option],
    )


def _help(field: Field[Any]) -> str:
    rule = field.metadata
    said = rule["help"][0].upper() + rule["help"][1:]
    if rule["among"]:
        said += f": {', '.join(rule['among'])}"
    elif bounds := bounds_of(field):
        said += f" ({bounds.removeprefix('of ')})"
    return said + "."


def _type(field: Field[Any], kind: type) -> tuple[Any, Callable[[str], Any] | None]:
    """What the command line takes for a field, and what reads it."""
    given = field.metadata["kind"]
    if given is not None and not isinstance(given, type):
        return str, _reader(given)
    if given is not None:
        return given, None
    hint = get_type_hints(kind)[field.name]
    for one in getattr(hint, "__args__", (hint,)):
        if one in _PLAIN:
            return one, None
    return list[str], None


def _reader(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, which hands on its error: the command raises it, where typer would draw a box."""

    @functools.wraps(parse)
    def read(text: str) -> Any:
        try:
            return parse(text)
        except InputError as problem:
            return problem

    return read


def _together(own: list[Any], context: typer.Context) -> None:
    """Refuse options that say one thing twice, or that do nothing by themselves."""
    word = {f.name: _word(f) for f in own}
    typed = {
        n for n in word if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"
    }
    for name, rule in ((f.name, f.metadata) for f in own if f.name in typed):
        if rule["excludes"] in typed:
            raise InputError(f"{word[name]} and {word[rule['excludes']]} are mutually exclusive")
        if rule["needs"] and rule["needs"] not in typed:
            raise InputError(f"{word[name]} needs {word[rule['needs']]}")
