"""The frame of every trial: texts times configurations, measured one by one and kept on disk.

Methods that leave the pass over the prompt as it is, and only keep other rows of it, share one such
pass: their caches are filled side by side.

Two numbers beside every score keep a comparison at equal budget honest, whatever a method says of
itself: the bytes its cache holds after the prompt, counted from storage, and the keys that a query
head reads in a step of decoding, counted at the attention call.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, RegardError
from regard.files import write_text
from regard.progress import bar
from regard.reach import Call, Handler

from .configurations import FULL, Configuration

Values = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Texts of one task that are read together, because their prompts are equally long.

    Attributes:
        numbers: which texts of the task they are.
        prompt: token ids that fill the cache, `[texts, tokens]`.
        measure: the scores of every text, one dictionary each, of a model under the methods and the
            cache after the prompt.
    """

    task: str
    numbers: tuple[int, ...]
    prompt: Tensor
    measure: Callable[[Any, Any], list[Values]]

    @property
    def tokens(self) -> int:
        """Length of the prompts; budgets may depend on it."""
        return self.prompt.shape[1]


@dataclass(frozen=True)
class Floor:
    """A plain model below `least` on a task leaves no room to tell methods apart there."""

    score: str
    least: float


class Meter(Handler):
    """Counts the keys that the query heads read in steps of one token."""

    def __init__(self) -> None:
        self.keys = self.heads = 0

    def after(self, call: Call, state: State) -> None:
        if call.q.shape[2] == 1:
            self.keys += call.q.shape[1] * call.k.shape[2]
            self.heads += call.q.shape[1]


class Fork(Handler):
    """Shows one pass over a prompt to methods that do not change its outputs, each with a cache of
    its own.
    """

    def __init__(self, methods: Sequence[Sequence[Handler]], caches: Sequence[Any]) -> None:
        self.methods, self.caches = methods, caches
        self.notes: list[list[str]] = [[] for _ in methods]

    def cache(self, cache: Any) -> None:
        for methods, own in zip(self.methods, self.caches):
            for method in methods:
                method.cache(own)

    def after(self, call: Call, state: State) -> None:
        for methods, own, notes in zip(self.methods, self.caches, self.notes):
            own.update(call.k, call.v, call.site.layer)
            with _notes() as new:
                for method in methods:
                    if method.before(call) is not None or method.after(call, state) is not None:
                        raise ValueError(f"{method!r} changes the pass over the prompt")
            notes += new


class Journal:
    """Finished measurements, kept on disk so that an interrupted run goes on where it stopped.

    Those of other settings (another model, other texts, other code) are not taken up.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.key = path, json.loads(json.dumps(key))
        self.cells: dict[str, Any] = {}
        self.spent, self.started = 0.0, time.perf_counter()
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["key"] == self.key:
                    self.cells, self.spent = dict(found["cells"]), float(found["seconds"])
            except (ValueError, KeyError, TypeError):
                pass  # half a file is no file: measure again

    @classmethod
    def beside(cls, out: Path | None, key: dict[str, Any]) -> Journal:
        """The journal of a result that is written to `out`; in memory alone for None and "-"."""
        file = out is not None and str(out) != "-"
        return cls(out.with_name(f".{out.name}.partial.json") if file and out else None, key)

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier legs included."""
        return self.spent + time.perf_counter() - self.started

    def put(self, name: str, cell: Any) -> None:
        """Add a measurement, and save."""
        self.cells[name] = cell
        if self.path is not None:
            found = {"key": self.key, "seconds": self.seconds, "cells": self.cells}
            write_text(self.path, json.dumps(found))

    def clear(self) -> None:
        """Forget everything: the result is written."""
        self.cells = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass
class Found:
    """What was measured, by configuration key and task.

    Attributes:
        values: text number -> scores.
        refused: why a method would not read the texts of a task.
        notes: warnings of the methods, by configuration key.
        low: tasks on which the plain model lies below the floor.
        skipped: tasks that were measured for the plain model alone, because of that.
    """

    values: dict[str, dict[str, dict[int, Values]]]
    refused: dict[str, dict[str, str]]
    notes: dict[str, list[str]]
    low: list[str]
    skipped: list[str]


def check(model: Any, configurations: Sequence[Configuration], batches: Sequence[Batch]) -> None:
    """Refuse what cannot work, before any work.

    Raises:
        InputError: a setting that a method or this model cannot take.
        ReachError: a model whose attention regard cannot reach.
    """
    from regard.watching import apply

    for configuration in configurations:
        for tokens in {b.tokens for b in batches}:
            apply(model, *configuration.handlers(tokens))


def run(
    model: Any,
    configurations: Sequence[Configuration],
    batches: Sequence[Batch],
    *,
    journal: Journal | None = None,
    floor: Floor | None = None,
    skip_low: bool = False,
    show: bool = True,
    label: str = "trial",
) -> Found:
    """Measure every text under every configuration; the plain model comes first.

    What the journal holds is not measured again, unless the code of the method has changed since.
    Texts that a method refuses are left out with its reason.

    Args:
        floor: marks tasks on which the plain model is too weak to tell methods apart.
        skip_low: such tasks are measured for the plain model alone.

    Raises:
        InputError: a method that cannot work on this model.
        ReachError: a model whose attention regard cannot reach.
    """
    check(model, configurations, batches)
    own = journal if journal is not None else Journal(None, {})
    found = Found({}, {}, {}, [], [])
    plain = [c for c in configurations if c.name == FULL]
    others = [c for c in configurations if c.name != FULL]
    with bar(len(batches) * len(configurations), label, show) as step:
        for group in (plain, others):
            for batch in batches:  # a run that is cut short has all methods on some texts
                skip = group is others and batch.task in found.skipped
                if not skip:
                    _measure_missing(model, batch, group, own)
                for configuration in group:
                    if not skip:
                        _take(found, batch, configuration, own.cells[_name(batch, configuration)])
                    step()
            if group is plain and floor is not None:
                found.low = _low(found, floor)
                found.skipped = list(found.low) if skip_low else []
    return found


def _low(found: Found, floor: Floor) -> list[str]:
    low = []
    for task, values in found.values.get(FULL, {}).items():
        scores = [float(v[floor.score]) for v in values.values()]
        if sum(scores) / len(scores) < floor.least:
            low.append(task)
    return low


def _name(batch: Batch, configuration: Configuration) -> str:
    return f"{configuration.key}/{batch.task}/{'.'.join(map(str, batch.numbers))}"


def _measure_missing(
    model: Any, batch: Batch, configurations: Sequence[Configuration], journal: Journal
) -> None:
    """Measure what the journal does not hold, or holds of other code."""
    missing = []
    for configuration in configurations:
        known = journal.cells.get(_name(batch, configuration))
        if known is None or known["source"] != configuration.source:
            missing.append(configuration)
    together = [c for c in missing if c.plain_prompt]
    shared = _share(model, batch, together) if len(together) > 1 else {}
    for configuration in missing:
        ready = shared.pop(configuration.key, None)
        journal.put(_name(batch, configuration), _measure(model, batch, configuration, ready))


@dataclass
class _Ready:
    """Methods and the cache after the prompt, as they left it."""

    methods: list[Handler]
    cache: Any
    notes: list[str]


def _share(model: Any, batch: Batch, configurations: Sequence[Configuration]) -> dict[str, _Ready]:
    """One pass over the prompt for all these configurations; nothing where a method refuses it,
    since then each has to be asked alone.
    """
    from transformers import DynamicCache

    from regard.watching import apply

    methods = [c.handlers(batch.tokens) for c in configurations]
    caches = [DynamicCache(config=model.config) for _ in methods]
    for own in methods:
        apply(model, *own)  # each looks up its sites
    fork = Fork(methods, caches)
    try:
        with torch.no_grad(), apply(model, fork):
            prefill(model, batch.prompt)
    except RegardError:
        return {}
    every = zip(configurations, methods, caches, fork.notes)
    return {c.key: _Ready(own, cache, notes) for c, own, cache, notes in every}


def _measure(
    model: Any, batch: Batch, configuration: Configuration, ready: _Ready | None = None
) -> dict[str, Any]:
    from regard.watching import apply

    cell: dict[str, Any] = {"source": configuration.source}
    meter, started = Meter(), time.perf_counter()
    methods = ready.methods if ready else configuration.handlers(batch.tokens)
    with _notes() as notes:
        try:
            with torch.no_grad(), apply(model, *methods, meter):
                cache = ready.cache if ready else prefill(model, batch.prompt)
                size = held(cache) / len(batch.numbers)
                values = batch.measure(model, cache)
        except RegardError as problem:
            if not configuration.parts:
                raise  # the plain model has no method to blame
            return {**cell, "refused": str(problem), "notes": []}
    read = meter.keys / meter.heads if meter.heads else None
    for one in values:
        one.update(held=size, read=read)
    notes[:0] = ready.notes if ready else []
    seconds = round(time.perf_counter() - started, 3)
    return {**cell, "values": values, "notes": notes, "seconds": seconds}


def _take(found: Found, batch: Batch, configuration: Configuration, cell: Any) -> None:
    key = configuration.key
    notes = found.notes.setdefault(key, [])
    notes += [n for n in cell["notes"] if n not in notes]
    if "refused" in cell:
        found.refused.setdefault(key, {})[batch.task] = cell["refused"]
        return
    tasks = found.values.setdefault(key, {})
    tasks.setdefault(batch.task, {}).update(zip(batch.numbers, cell["values"]))


@contextmanager
def _notes() -> Iterator[list[str]]:
    """The warnings of regard's methods as notes; those of others go their way."""
    package = Path(__file__).resolve().parents[2]
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for one in caught:
        if package in Path(one.filename).resolve().parents:
            notes += [str(one.message)] if str(one.message) not in notes else []
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def fingerprint(modules: Sequence[str], texts: Any = None) -> str:
    """Twelve digits that change when what is measured, or the code that measures, does.

    Args:
        modules: files of this package, without ending, that a trial is made of beside this one.
    """
    mark = hashlib.sha256(json.dumps(texts).encode())
    for name in ("frame", *modules):
        mark.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return mark.hexdigest()[:12]


# -- reading a text with a cache -------------------------------------------------------------------
def prefill(model: Any, ids: Tensor) -> Any:
    """The cache after prompts `[batch, tokens]`, as the methods at work leave it."""
    from transformers import DynamicCache

    # handed over, and not left to the model: methods put their own storage into it
    cache = DynamicCache(config=model.config)
    model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits `[batch, vocabulary]` after one more token each, `[batch, 1]`."""
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return logits[:, -1]


def held(cache: Any) -> int:
    """Bytes of keys and values that the layers of a cache hold.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    >>> held(cache)
    192
    """
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "nbytes", None)  # a layer that a method put there counts its storage
        if own is None:
            pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
            own = sum(t.numel() * t.element_size() for t in pair if t is not None)
        total += int(own)
    return total


def check_room(model: Any, tokens: int) -> None:
    """InputError where the model has fewer positions than so many tokens need."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise InputError(
            f"{tokens} tokens are needed, and the model has {room} positions: ask for less"
        )
