"""The frame of every trial: samples times configurations, measured one by one and kept on disk.

Two numbers beside every score keep a comparison at equal budget honest, whatever a method says of
itself: the bytes its cache holds after the prompt, counted from storage, and the keys that a query
head reads in a step of decoding, counted at the attention call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.bench.record import UNSUPPORTED, Cell, Result
from regard.core import State
from regard.errors import InputError, RegardError
from regard.reach import Call, Handler

from .configurations import Configuration

Values = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One text to judge a model by: `measure(model)` gives its scores, run under the methods."""

    task: str
    number: int
    measure: Callable[[Any], Values]


class Meter(Handler):
    """Counts the keys that the query heads read in steps of one token."""

    def __init__(self) -> None:
        self.keys = self.heads = 0

    def after(self, call: Call, state: State) -> None:
        if call.q.shape[2] == 1:
            self.keys += call.q.shape[1] * call.k.shape[2]
            self.heads += call.q.shape[1]


def key_of(sample: Sample, configuration: Configuration) -> str:
    """The name of a measurement.

    >>> key_of(Sample("perplexity", 3, dict), Configuration("full"))
    'perplexity/3/full'
    """
    return f"{sample.task}/{sample.number}/{configuration.name}"


def run(
    result: Result,
    model: Any,
    configurations: Sequence[Configuration],
    samples: Sequence[Sample],
    out: Path | None = None,
    show: bool = True,
) -> Result:
    """Measure every sample under every configuration, and save after each to `out`.

    What the result holds already is not measured again, unless the code of the method has changed
    since. A sample that a method refuses is a cell with the reason.

    Raises:
        InputError: a method that cannot work on this model.
        ReachError: a model whose attention regard cannot reach.
    """
    from regard.api import apply

    for configuration in configurations:
        apply(model, *configuration.handlers())  # what cannot work is refused before any work
    result.save(out)
    todo = [
        (sample, configuration)
        for sample in samples
        for configuration in configurations
        if not _settled(result, sample, configuration)
    ]
    with _progress(len(todo), result.name, show) as step:
        for sample, configuration in todo:
            result.cells[key_of(sample, configuration)] = _measure(model, sample, configuration)
            result.save(out)
            step()
    return result


def _settled(result: Result, sample: Sample, configuration: Configuration) -> bool:
    key = key_of(sample, configuration)
    return result.settled(key) and result.cells[key].settings["source"] == configuration.source


def _measure(model: Any, sample: Sample, configuration: Configuration) -> Cell:
    from regard.api import apply

    settings = {
        "task": sample.task,
        "number": sample.number,
        "configuration": configuration.name,
        "source": configuration.source,
    }
    meter, started = Meter(), time.perf_counter()
    try:
        with torch.no_grad(), apply(model, *configuration.handlers(), meter):
            values = sample.measure(model)
    except RegardError as problem:
        if not configuration.parts:
            raise  # the plain model has no method to blame
        return Cell(settings, UNSUPPORTED, str(problem))
    values["read"] = meter.keys / meter.heads if meter.heads else None
    values["seconds"] = round(time.perf_counter() - started, 3)
    return Cell(settings, values=values)


# -- reading a text with a cache -------------------------------------------------------------------
def prefill(model: Any, ids: Tensor) -> Any:
    """The cache after a prompt `[1, tokens]`, as the methods at work leave it.

    Raises:
        InputError: more tokens than the model has positions, or none.
    """
    from transformers import DynamicCache

    if not ids.shape[1]:
        raise InputError("the prompt is empty: a cache needs at least one token")
    # handed over, and not left to the model: methods put their own storage into it
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def check_room(model: Any, tokens: int) -> None:
    """InputError where the model has fewer positions than so many tokens need."""
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise InputError(f"{tokens} tokens are needed, and the model has {room} positions: ask for"
                         " less")  # fmt: skip


def held(cache: Any) -> int:
    """Bytes of the storage that the layers of a cache hold, each counted once.

    A view counts with all that it keeps alive.

    >>> from types import SimpleNamespace as Some
    >>> whole = torch.zeros(100)
    >>> held(Some(layers=[Some(keys=whole[:10], more=[whole[50:], torch.zeros(2)])]))
    408
    """
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}
    return sum(sizes.values())


def _tensors(cache: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    stack = list(cache.layers)
    while stack:
        thing = stack.pop()
        if isinstance(thing, Tensor):
            yield thing
        elif id(thing) not in seen:
            seen.add(id(thing))
            if isinstance(thing, dict):
                stack += thing.values()
            elif isinstance(thing, (list, tuple, set)):
                stack += thing
            elif not isinstance(thing, (type, Handler)) and hasattr(thing, "__dict__"):
                stack += vars(thing).values()


@contextmanager
def _progress(total: int, label: str, show: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
