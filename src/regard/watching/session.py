"""`regard.watch`, `regard.apply` and their results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch

from regard.core import FACTS, Fact, Rows
from regard.errors import InputError, NeedsMatrix, nearest
from regard.reach import Collector, Handler, Session, Site
from regard.reach.sites import setting
from regard.reach.verify import difference

_MATRIX = {"map", "maps", "attention", "attentions", "weights", "matrix", "probabilities"}


def facts() -> dict[str, str]:
    """Every fact by name, with one line on what it is.

    >>> sorted(facts())[:3]
    ['collision', 'columns', 'distance']
    """
    return {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in FACTS.items()}


def watch(
    model: Any,
    facts: Sequence[str | Fact] = ("received", "entropy"),
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    part: str | None = None,
    tokenizer: Any = None,
    exact_outputs: bool = False,
) -> Watch:
    """Measure exact facts of attention while the model runs, at about the cost of one more fused
    attention.

    Args:
        model: any loaded transformers model whose attention goes through the `AttentionInterface`.
        facts: names (see `regard.facts()`) or `core.Fact` objects with settings, for example
            `Influence(band=(10, 100))`.
        layers, heads: which to measure; all when None.
        part: one stack of a model that has several (encoder, decoder, vision tower), by its name
            in `Watch.parts`.
        tokenizer: decodes the tokens of the report; the one that `regard.load` brought when None.
        exact_outputs: keep the model's outputs to the last bit. Otherwise, on a CPU in float32, one
            sweep over the scores gives outputs and facts together; it is faster, and outputs
            differ by about 1e-6 as those of two kernels do.

    Use it as a context manager, or call `attach()` and `detach()`.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> with regard.watch(model, facts=["received", "entropy"]) as seen:
    ...     _ = model(torch.arange(10)[None])
    >>> seen["received"][0].shape, seen["received"][0].dtype
    (torch.Size([1, 4, 10]), torch.float32)
    >>> seen["entropy"].stack().shape
    torch.Size([2, 1, 4, 10])

    Raises:
        InputError: an unknown fact, a layer or head out of range.
        NeedsMatrix: a fact that is the attention matrix itself.
        ReachError: a model whose attention regard cannot reach.
    """
    return Watch(
        model,
        facts,
        layers=layers,
        heads=heads,
        part=part,
        tokenizer=tokenizer,
        exact_outputs=exact_outputs,
    )


def apply(model: Any, *methods: Handler) -> Session:
    """Run the model with methods that act on its attention calls, in the order given.

    Use it as a context manager, or call `attach()` and `detach()`; afterwards the model is as it
    was.

    Raises:
        InputError: a setting that this model cannot take.
        ReachError: a model whose attention regard cannot reach.
    """
    for method in methods:
        if not isinstance(method, Handler):
            raise InputError(f"{method!r} is no method: `regard methods` lists what there is")
    return Session(model, methods)


class Layers(Mapping[int, Any]):
    """One fact over the layers: by layer number of the main part, or by site or part name."""

    def __init__(self, values: dict[Site, Any], main: str) -> None:
        self._values, self._main = values, main

    def __getitem__(self, key: int | str | Site) -> Any:
        if isinstance(key, Site):
            return self._values[key]
        if isinstance(key, str):
            for site, value in self._values.items():
                if site.name == key:
                    return value
            if any(s.part == key for s in self._values):
                return Layers({s: v for s, v in self._values.items() if s.part == key}, key)
            raise KeyError(
                f"no part or module {key!r} was seen.{nearest(key, {s.part for s in self._values})}"
            )
        for site, value in self._values.items():
            if site.part == self._main and site.layer == key:
                return value
        raise KeyError(f"layer {key} was not watched: there are {sorted(self)}")

    def __iter__(self) -> Iterator[int]:
        return iter(s.layer for s in self._values if s.part == self._main)

    def __len__(self) -> int:
        return sum(s.part == self._main for s in self._values)

    def sites(self) -> list[tuple[Site, Any]]:
        """Site and value of every layer of the main part."""
        return [(s, v) for s, v in self._values.items() if s.part == self._main]

    def stack(self) -> Any:
        """All layers of the main part as one tensor, `[layers, batch, heads, ...]`.

        Raises:
            InputError: the layers differ in shape, or nothing was seen.
        """
        values = [self[n] for n in self]
        shapes = {tuple(v.shape) for v in values if torch.is_tensor(v)}
        if len(shapes) != 1 or not all(map(torch.is_tensor, values)):
            raise InputError(
                f"layers of shapes {sorted(shapes)} cannot be stacked: take them one by one"
            )
        return torch.stack(values)

    def __repr__(self) -> str:
        shown = {
            s.name: tuple(v.shape) if hasattr(v, "shape") else type(v).__name__
            for s, v in self._values.items()
        }
        return f"Layers({shown})"


class Watch(Session):
    """A session that measures facts; the results stay after it ends.

    `seen["received"]` maps layer numbers to `[batch, heads, keys]`. In a model of several stacks
    the numbers are those of the main one, the last self-attention stack (the language model, the
    decoder); the others go by name: `seen["received"]["model.encoder.layers"][3]`.
    """

    lasts = False  # facts that nobody holds are measured for nobody

    def __init__(
        self,
        model: Any,
        facts: Sequence[str | Fact],
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        part: str | None = None,
        tokenizer: Any = None,
        exact_outputs: bool = False,
    ) -> None:
        named = facts if isinstance(facts, Iterable) and not isinstance(facts, str) else [facts]
        self.facts = [_fact(f, model) for f in named]
        if not self.facts:
            raise InputError(
                f'name at least one fact, for example "received"; known are {", ".join(FACTS)}'
            )
        layers, heads = _numbers("layers", layers), _numbers("heads", heads)
        self._collector = Collector(self.facts, layers, heads, part, exact_outputs)
        super().__init__(model, [self._collector])
        _check_heads(model, heads)
        self.input_ids: Any = None
        self.inputs: dict[str, Any] | None = None  # of the forward that began the run
        self.tokenizer: Any = tokenizer if tokenizer is not None else _tokenizer(model)
        self.seconds = 0.0

    def attach(self) -> Watch:
        super().attach()
        before = self.module.register_forward_pre_hook(self._enter_forward, with_kwargs=True)
        after = self.module.register_forward_hook(self._leave_forward)
        self._undo += [before.remove, after.remove]
        self._keep_hooks()
        return self

    def _enter_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args and torch.is_tensor(args[0]) else None)
        self._started = time.perf_counter()
        if not torch.is_tensor(ids) or ids.is_floating_point():
            self.input_ids = None  # given as embeddings: what is known of another text is not this
            self.inputs = None
        else:
            cache = kwargs.get("past_key_values")
            going_on = (
                self.input_ids is not None and cache is not None and cache.get_seq_length() > 0
            )
            if not going_on:
                self.inputs = None if args[1:] else dict(kwargs)
            ids = ids.detach().cpu()
            self.input_ids = torch.cat([self.input_ids, ids], 1) if going_on else ids

    def _leave_forward(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    # -- results -----------------------------------------------------------------------------------
    @property
    def parts(self) -> list[str]:
        """The stacks of the model, in order of definition."""
        return list(dict.fromkeys(s.part for s in self.sites))

    @property
    def main(self) -> str:
        """The stack that plain layer numbers mean: the last one of self-attention."""
        parts = [r.site.part for r in self._records() if r.site.kind == "self"]
        parts = parts or [r.site.part for r in self._records()] or self.parts
        return parts[-1]

    @property
    def causal(self) -> bool:
        """Whether no token of the main part looks ahead."""
        return all(r.causal for r in self._records() if r.site.part == self.main)

    @property
    def difference(self) -> float | None:
        """How far the attention of this kind of model was from its own function, relative, where
        the first call of each kind of module is computed both ways; None before that.
        """
        modules = dict(self.module.named_modules(remove_duplicate=False))
        return difference(modules[s.name] for s in self.sites)

    def __getitem__(self, fact: str | Fact) -> Layers:
        watched = next((f for f in self.facts if fact in (f, f.name)), None)
        if watched is None:
            names = [f.name for f in self.facts]
            raise KeyError(f"{fact!r} was not watched.{nearest(str(fact), names)}")
        main = self.record.site.part
        values = {r.site: self._collector.value(r, watched) for r in self._records()}
        return Layers({s: v for s, v in values.items() if v is not None}, main)

    def __contains__(self, fact: object) -> bool:
        return any(fact in (f, f.name) for f in self.facts)

    def __iter__(self) -> Iterator[str]:
        return iter(f.name for f in self.facts)

    def _records(self) -> list[Any]:
        records = self._collector.records
        return [records[i] for i in sorted(records)]

    @property
    def record(self) -> Any:
        """The `reach.collect.Record` of the first layer seen of the main part."""
        main = self.main
        records = [r for r in self._records() if r.site.part == main]
        if not records:
            raise InputError(
                "nothing was seen yet: run the model inside the `with`; if it runs compiled, pass "
                "the compiled model"
            )
        return records[0]

    @property
    def whole(self) -> bool:
        """Whether all layers and heads were measured."""
        return self._collector.layers is None and self._collector.heads is None

    def rows(
        self, token: str | int | Sequence[int], *, occurrence: int | None = None, row: int = 0
    ) -> Layers:
        """What a token looks at: its exact row of every layer of the main part, `[heads, keys]`.

        The rows come from one more forward over the same inputs, under the methods that are applied
        when you ask; no map is kept. Rows that were watched (`core.Rows`) cost nothing more.

        Args:
            token: a word as it stands in the text, or the position of a token, from the end where
                negative; of several pieces, or positions, their mean.
            occurrence: which one, from 0, where the text holds the word several times.
            row: which row of the batch.

        >>> import regard
        >>> model = regard.zoo.tiny("llama")
        >>> with regard.watch(model) as seen:
        ...     _ = model(torch.arange(10)[None])
        >>> seen.rows(-1)[0].shape  # of the last token, in layer 0
        torch.Size([4, 10])

        Raises:
            InputError: a word that the text does not hold or holds several times, a position or a
                row beyond it.
            ReachError: what was seen cannot be run again from its token ids.
        """
        from .overview import text_of
        from .rows import positions, seen_again

        pieces, places = text_of(self, row)
        chosen = positions(token, pieces, occurrence)
        queries = [places[n] for n in chosen]
        watched = [f for f in self.facts if isinstance(f, Rows) and {*queries} <= {*f.queries}]
        fact, seen = (watched[0], self) if watched else (Rows(tuple(queries)), None)
        layers = (seen or seen_again(self, queries))[fact]
        where = [fact.queries.index(n) for n in queries]
        values = {s: v[row][:, where].mean(1) for s, v in layers.sites()}
        return Layers(values, self.record.site.part)

    def table(self) -> list[dict[str, Any]]:
        """One row a layer of the main part: the mean of each fact over batch, heads and tokens.

        A list of dictionaries that prints as a table.
        """
        from .overview import table

        return table(self)

    def show(self) -> Any:
        """In a notebook the figures, in a terminal the table."""
        from regard.report import show

        from .overview import overview

        return show(overview(self))

    def report(self, path: str | Path, **meta: Any) -> Path:
        """Write one self-contained HTML page that opens offline.

        Raises:
            InputError: a place that cannot be written to, or nothing to report yet.
        """
        from regard.report import write_page

        from .overview import overview

        page = overview(self, **meta)
        try:
            return write_page(page, path)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise InputError(str(error)) from None


def _fact(fact: str | Fact, model: Any) -> Fact:
    if isinstance(fact, Fact):
        return fact
    if not isinstance(fact, str):
        raise InputError(
            f'{fact!r} is no fact: give a name such as "entropy", or an object such as '
            "core.Influence(band=(10, 100))"
        )
    if fact.lower() in _MATRIX:
        text = _text_config(model)
        heads = setting(text, "num_attention_heads", 1) * setting(text, "num_hidden_layers", 1)
        gib = {n: heads * n**2 * 4096 * 4096 * 4 / 2**30 for n in (1, 4)}
        at = {n: f"{size:,.0f} GiB" if size > 1 else f"{size:.2g} GiB" for n, size in gib.items()}
        raise NeedsMatrix(
            f"{fact!r} is the whole queries x keys matrix: with the {heads} heads of this model "
            f'{at[1]} at 4k tokens, {at[4]} at 16k. Ask for "thumbnail" (the map averaged to '
            "64 x 64 cells), or for exact rows and columns: core.Rows(queries=...), "
            "core.Columns(keys=...)"
        )
    if fact not in FACTS:
        raise InputError(f"unknown fact {fact!r}.{nearest(fact, FACTS)}")
    try:
        return FACTS[fact]()
    except ValueError as error:
        raise InputError(str(error)) from None


def _tokenizer(model: Any) -> Any:
    from regard.zoo import tokenizer_of

    return tokenizer_of(model)


def _numbers(name: str, given: Iterable[int] | None) -> list[int] | None:
    """Layers or heads as a list, whatever holds them."""
    if given is None:
        return None
    try:
        numbers = [index(n) for n in given]
    except TypeError:
        numbers = []
    if not numbers:
        raise InputError(f"{name} is a list of numbers such as [0, 3], not {given!r}")
    return numbers


def _check_heads(model: Any, heads: Sequence[int] | None) -> None:
    text = _text_config(model)
    count = setting(text, "num_attention_heads")
    wrong = [h for h in heads or [] if h < 0 or (count is not None and h >= count)]
    if wrong:
        raise InputError(f"head {wrong[0]} is out of range: this model has {count} heads, from 0")


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
