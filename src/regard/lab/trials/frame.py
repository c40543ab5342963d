"""The frame of every trial: texts times configurations, measured one by one and kept on disk.

Methods that leave the pass over the prompt as it is, and only keep other rows of it, share one such
pass: their caches are filled side by side.

Two numbers beside every score keep a comparison at equal budget honest, whatever a method says of
itself: the bytes its cache holds after the prompt, counted from storage, and the keys that a query
head reads in a step of decoding, counted at the attention call.
"""

from __future__ import annotations

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
from regard.lab.intervals import mean
from regard.lab.journal import Journal
from regard.parts.decoding.cache import held_bytes
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
    """Shows one pass over a prompt to methods that do not change it, each with its own cache."""

    def __init__(self, methods: Sequence[Sequence[Handler]], caches: Sequence[Any]) -> None:
        self.methods, self.caches = methods, caches
        self.notes: list[list[str]] = [[] for _ in methods]

    def cache(self, cache: Any) -> None:
        for methods, separate in zip(self.methods, self.caches):
            for method in methods:
                method.cache(separate)

    def after(self, call: Call, state: State) -> None:
        for methods, cache, notes in zip(self.methods, self.caches, self.notes):
            cache.update(call.k, call.v, call.site.layer)
            with _notes() as new:
                for method in methods:
                    if method.before(call) is not None or method.after(call, state) is not None:
                        raise ValueError(f"{method!r} changes the pass over the prompt")
            notes += new


@dataclass
class Scores:
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
    """Refuse every configuration that cannot work, before the first is measured.

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
) -> Scores:
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
    journal = journal if journal is not None else Journal(None, {})
    scores = Scores({}, {}, {}, [], [])
    plain = [c for c in configurations if c.name == FULL]
    others = [c for c in configurations if c.name != FULL]
    with bar(len(batches) * len(configurations), label, show) as step:
        for group in (plain, others):
            for batch in batches:  # a run that is cut short has all methods on some texts
                skip = group is others and batch.task in scores.skipped
                if not skip:
                    _measure_missing(model, batch, group, journal)
                for configuration in group:
                    if not skip:
                        cell = journal.parts[_name(batch, configuration)]
                        _take(scores, batch, configuration, cell)
                    step()
            if group is plain and floor is not None:
                scores.low = _low(scores, floor)
                scores.skipped = list(scores.low) if skip_low else []
    return scores


def _low(scores: Scores, floor: Floor) -> list[str]:
    low = []
    for task, values in scores.values.get(FULL, {}).items():
        if mean([float(v[floor.score]) for v in values.values()]) < floor.least:
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
        known = journal.parts.get(_name(batch, configuration))
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
    for group in methods:
        apply(model, *group)  # each looks up its sites
    fork = Fork(methods, caches)
    try:
        with torch.no_grad(), apply(model, fork):
            prefill(model, batch.prompt)
    except RegardError:
        return {}
    every = zip(configurations, methods, caches, fork.notes)
    return {c.key: _Ready(group, cache, notes) for c, group, cache, notes in every}


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
                size = held_bytes(cache) / len(batch.numbers)
                values = batch.measure(model, cache)
        except RegardError as problem:
            if not configuration.parts:
                raise  # the plain model has no method to blame
            return {**cell, "refused": str(problem), "notes": []}
    read = meter.keys / meter.heads if meter.heads else None
    for scored in values:
        scored.update(held=size, read=read)
    notes[:0] = ready.notes if ready else []
    seconds = round(time.perf_counter() - started, 3)
    return {**cell, "values": values, "notes": notes, "seconds": seconds}


def _take(scores: Scores, batch: Batch, configuration: Configuration, cell: Any) -> None:
    key = configuration.key
    notes = scores.notes.setdefault(key, [])
    notes += [n for n in cell["notes"] if n not in notes]
    if "refused" in cell:
        scores.refused.setdefault(key, {})[batch.task] = cell["refused"]
        return
    tasks = scores.values.setdefault(key, {})
    tasks.setdefault(batch.task, {}).update(zip(batch.numbers, cell["values"]))


@contextmanager
def _notes() -> Iterator[list[str]]:
    """The warnings of regard's methods as notes; those of others go their way."""
    package = Path(__file__).resolve().parents[2]
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for warning in caught:
        if package in Path(warning.filename).resolve().parents:
            notes += [str(warning.message)] if str(warning.message) not in notes else []
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


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


def check_room(model: Any, tokens: int) -> None:
    """InputError where the model has fewer positions than so many tokens need."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise InputError(
            f"{tokens} tokens are needed, and the model has {room} positions: ask for less"
        )
