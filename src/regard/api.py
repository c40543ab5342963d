"""What a person types: `regard.watch`, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regard.core import FACTS, Fact
from regard.errors import InputError, NeedsMatrix, nearest
from regard.reach import Collector, Handler, Session, Site

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

    Use it as a context manager, or call `attach()` and `detach()`.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> with regard.watch(model, facts=["received", "entropy"]) as seen:
    ...     _ = model(torch.arange(10)[None])
    >>> seen["received"][0].shape, seen["received"][0].dtype
    (torch.Size([1, 4, 10]), torch.float32)

    Raises:
        InputError: an unknown fact, a layer or head out of range.
        NeedsMatrix: a fact that is the attention matrix itself.
        ReachError: a model whose attention regard cannot reach.
    """
    return Watch(model, facts, layers=layers, heads=heads, part=part, tokenizer=tokenizer)


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
            raise InputError(f"{method!r} is no method: give, for example, regard.ACT(beta=0.4)")
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

    def __repr__(self) -> str:
        shown = {
            s.name: tuple(v.shape) if hasattr(v, "shape") else type(v).__name__
            for s, v in self._values.items()
        }
        return f"Layers({shown})"


class Watch(Session):
    """A session that measures facts; the results stay after it ends.

    `seen["received"]` maps layer numbers to `[batch, heads, keys]`. In a model of several stacks
    the numbers
    are those of the main one, the last self-attention stack (the language model, the decoder); the
    others go by
    name: `seen["received"]["model.encoder.layers"][3]`.
    """

    def __init__(
        self,
        model: Any,
        facts: Sequence[str | Fact],
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        part: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        named = [facts] if isinstance(facts, (str, Fact)) else facts
        self.facts = [_fact(f, model) for f in named]
        if not self.facts:
            raise InputError(
                f'name at least one fact, for example "received"; known are {", ".join(FACTS)}'
            )
        self._collector = Collector(self.facts, layers, heads, part)
        super().__init__(model, [self._collector])
        _check_heads(model, heads)
        self.input_ids: Any = None
        self.tokenizer: Any = tokenizer if tokenizer is not None else _tokenizer(model)
        self.seconds = 0.0

    def attach(self) -> Watch:
        super().attach()
        before = self.module.register_forward_pre_hook(self._enter_forward, with_kwargs=True)
        after = self.module.register_forward_hook(self._leave_forward)
        self._undo += [before.remove, after.remove]
        return self

    def _enter_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args and torch.is_tensor(args[0]) else None)
        self._started = time.perf_counter()
        if torch.is_tensor(ids) and not ids.is_floating_point():
            cache = kwargs.get("past_key_values")
            going_on = (
                self.input_ids is not None and cache is not None and cache.get_seq_length() > 0
            )
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
        own = [r.site.part for r in self._records() if r.site.kind == "self"]
        own = own or [r.site.part for r in self._records()] or self.parts
        return own[-1]

    @property
    def causal(self) -> bool:
        """Whether no token of the main part looks ahead."""
        return all(r.causal for r in self._records() if r.site.part == self.main)

    def __getitem__(self, fact: str | Fact) -> Layers:
        wanted = next((f for f in self.facts if fact in (f, f.name)), None)
        if wanted is None:
            names = [f.name for f in self.facts]
            raise KeyError(f"{fact!r} was not watched.{nearest(str(fact), names)}")
        if not self._records():
            raise RuntimeError("nothing was seen yet: run the model inside the `with`")
        values = {r.site: self._collector.value(r, wanted) for r in self._records()}
        return Layers({s: v for s, v in values.items() if v is not None}, self.main)

    def __contains__(self, fact: object) -> bool:
        return any(fact in (f, f.name) for f in self.facts)

    def __iter__(self) -> Iterator[str]:
        return iter(f.name for f in self.facts)

    def _records(self) -> list[Any]:
        records = self._collector.records
        return [records[i] for i in sorted(records)]

    def table(self) -> list[dict[str, Any]]:
        """One row a layer of the main part: the mean of each fact over batch, heads and tokens.

        A list of dictionaries that prints as a table.
        """
        from regard.see.overview import table

        return table(self)

    def show(self) -> Any:
        """In a notebook the figures, in a terminal the table."""
        from regard.report import show
        from regard.see.overview import overview

        return show(overview(self))

    def report(self, path: str | Path, **meta: Any) -> Path:
        """Write one self-contained HTML page that opens offline."""
        from regard.report import write_page
        from regard.see.overview import overview

        return write_page(overview(self, **meta), path)


def _fact(fact: str | Fact, model: Any) -> Fact:
    if isinstance(fact, Fact):
        return fact
    if fact.lower() in _MATRIX:
        text = _text_config(model)
        heads = getattr(text, "num_attention_heads", 1) * getattr(text, "num_hidden_layers", 1)
        at = {n: f"{heads * n**2 * 4096 * 4096 * 4 / 2**30:,.0f} GiB" for n in (1, 4)}
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


def _check_heads(model: Any, heads: Sequence[int] | None) -> None:
    text = _text_config(model)
    count = getattr(text, "num_attention_heads", None)
    wrong = [h for h in heads or [] if h < 0 or (count is not None and h >= count)]
    if wrong:
        raise InputError(f"head {wrong[0]} is out of range: this model has {count} heads, from 0")


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
