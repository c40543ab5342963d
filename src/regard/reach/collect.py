"""Collector: the handler that measures facts of every call it sees, prefill and decoding alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Fact, State, measure
from regard.core.facts import Sums, View
from regard.errors import InputError, ReachError

from . import dispatch
from .call import Call, Facts, Handler, Site

_SWEPT = (torch.float32, torch.float64)  # halves keep the kernel that rounds as the model does


@dataclass
class Record:
    """What one site has shown since its run began."""

    site: Site
    sums: list[Sums]
    rows: int  # queries seen
    end: int  # position after the last query
    keys: int  # keys seen
    trace: Tensor  # one number of every cached key: tells when a cache was reordered
    causal: bool  # no query of the first call sees a later key
    facts: list[Fact]  # those that mean something here, in the order of the sums
    live: Tensor | None = None  # [batch, rows], false for padding; None where all are tokens
    total: Tensor | None = None  # of all q and k, on a GPU: not finite where one of them is not


class Collector(Handler):
    """Facts of the chosen layers and heads.

    A run begins with a call that starts at position 0; later calls with a cache add to it, so that
    a generation gives, token by token, what one forward over the whole text gives. A new run
    replaces the last.

    Args:
        exact_outputs: leave the computation of the outputs to the kernel that the model has without
            facts. Else, in 32 bits and more on a CPU, one sweep over the scores gives both, and
            outputs differ in the last digits, as those of two kernels do.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        part: str | None = None,
        exact_outputs: bool = False,
    ) -> None:
        self.facts = list(facts)
        self.layers = None if layers is None else list(layers)
        self.heads = None if heads is None else list(heads)
        self.part = part
        self.exact_outputs = exact_outputs
        self.records: dict[int, Record] = {}
        self._chosen: list[Site] = []
        self._main = ""

    def sites(self, sites: list[Site]) -> list[Site]:
        parts = sorted({s.part for s in sites})
        if self.part is not None and self.part not in parts:
            raise InputError(
                f"no part {self.part!r} in this model: its attention lies in {', '.join(parts)}"
            )
        chosen = [s for s in sites if self.part in (None, s.part)]
        if self.layers is not None:
            known = {s.layer for s in chosen}
            wrong = sorted(set(self.layers) - known)
            if wrong:
                raise InputError(
                    f"layer {wrong[0]} is out of range: this model has layers "
                    f"{min(known)} to {max(known)}"
                )
            chosen = [s for s in chosen if s.layer in self.layers]
        self._chosen = chosen
        self._main = ([s for s in sites if s.kind == "self"] or sites)[-1].part
        return chosen

    def generation(self, config: Any) -> None:
        if self._main not in {s.part.removesuffix(" cross") for s in self._chosen}:
            return
        beams = getattr(config, "num_beams", None) or 1
        held = getattr(config, "cache_implementation", None)
        for cause, asked, remedy in (
            ("beam search changes the places of the rows in the cache", beams > 1, "num_beams=1"),
            ("prompt lookup takes tokens back from the cache",
             getattr(config, "prompt_lookup_num_tokens", None), "no prompt lookup"),
            ("assisted decoding takes tokens back from the cache", dispatch.assisted()
             or getattr(config, "assistant_early_exit", None), "no assistant"),
            ("a quantized cache changes the keys it holds", held == "quantized", "a plain cache"),
        ):  # fmt: skip
            if asked:
                raise ReachError(
                    f"{cause}, so sums over a generation cannot go on: watch with {remedy}, or "
                    "watch one forward over the finished text"
                )

    def measures(self, call: Call) -> Facts | None:
        some = self.heads is not None or call.heads is not None or call.positions is not None
        if self.exact_outputs or some or call.repeats or call.q.dtype not in _SWEPT:
            return None
        record = self._running(call)
        return Facts(self, self._facts(call), self._offsets(call, record), record)

    def _offsets(self, call: Call, record: Record | None) -> tuple[int, int]:
        """Where this call stands in its run."""
        if record is not None and call.chunk:
            return record.rows, record.keys
        if call.site.kind == "cross":
            return record.rows if record else 0, 0
        return call.query_offset, call.key_offset

    def after(self, call: Call, state: State) -> State | None:
        total = call.q.sum(dtype=torch.float32) + call.k.sum(dtype=torch.float32)
        if not total.is_cuda:  # to ask a GPU now would hold up its queue in every layer
            must_be_finite(total, call.site)
        if call.heads is not None or call.positions is not None:
            raise ReachError(
                f"the heads of {call.site.name} look at different keys under another method, and "
                "facts of such calls are not measured yet: watch without that method"
            )
        if call.repeats:
            return None
        facts = self._facts(call)
        q, k, lse = call.q, call.k, state.lse
        if self.heads is not None:
            wrong = [h for h in self.heads if not 0 <= h < q.shape[1]]
            if wrong:
                raise InputError(
                    f"head {wrong[0]} is out of range: {call.site.name} has heads "
                    f"0 to {q.shape[1] - 1}"
                )
            of_key = [h // (q.shape[1] // k.shape[1]) for h in self.heads]
            q, k, lse = q[:, self.heads], k[:, of_key], lse[:, self.heads]
        given = call.measured
        if given is not None and given.handler is self and given.state is state:
            assert given.sums is not None
            record, offsets, sums = given.record, given.offsets, given.sums
        else:
            record = self._running(call)
            offsets = self._offsets(call, record)
            sums = self._measure(call, q, k, lse, facts, offsets)
        trace = call.k[:, 0, :, 0].detach().clone()
        queries = q.shape[2]
        end = (offsets[0] if call.site.kind == "self" else call.past or 0) + queries
        keys = offsets[1] + k.shape[2]
        if record is None:
            causal = call.site.kind == "self" and not _looks_ahead(call)
            unread = total if total.is_cuda else None
            self.records[call.site.index] = Record(
                call.site, sums, queries, end, keys, trace, causal, facts, call.live, unread
            )
            return None
        view = View(
            q.shape[0],
            k.shape[1],
            q.shape[1] // k.shape[1],
            queries,
            k.shape[2],
            *offsets,
            lse.dtype,
            q.device,
        )
        record.sums = [f.extend(old, new, view) for f, old, new in zip(facts, record.sums, sums)]
        record.live = _appended(record.live, record.rows, call.live, queries)
        record.rows, record.end, record.trace = record.rows + queries, end, trace
        record.keys = max(record.keys, keys)
        record.total = None if record.total is None else record.total + total
        return None

    def _measure(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        facts: list[Fact],
        offsets: tuple[int, int],
    ) -> list[Sums]:
        """Facts of the chosen heads, by a pass of their own."""
        mask, bias, sinks = call.mask, call.bias, call.sinks
        if self.heads is not None:
            mask = mask.of_heads(self.heads)
            bias = bias[:, self.heads] if bias is not None and bias.shape[1] > 1 else bias
            if sinks is not None:
                sinks = sinks[:, self.heads] if sinks.dim() == 3 else sinks[self.heads]
        options: Any = {"softcap": call.softcap, "live": call.live, "offsets": offsets}
        return measure(
            q, k, lse, facts, mask=mask, scale=call.scale, bias=bias, sinks=sinks, **options
        )

    def _facts(self, call: Call) -> list[Fact]:
        placed = call.site.kind == "self" and not call.joint
        return [f for f in self.facts if placed or not f.positional]

    def _running(self, call: Call) -> Record | None:
        """The record that this call goes on with, None when it begins a run."""
        if dispatch.before_first_token():
            _must_be_tokens(call)
        record = self.records.get(call.site.index)
        if record is None or call.chunk:
            return record
        if call.site.kind == "cross":
            # it sees no position: it goes on where the forward pass goes on with a cache
            return record if call.past and call.past == record.end else None
        if call.query_offset == 0:
            return None
        _must_be_tokens(call)
        if call.query_offset != record.end:
            raise ReachError(
                f"the cache was cut back from {record.end} to {call.query_offset} tokens (assisted "
                "decoding does that), so sums over it cannot go on: watch a plain generation, or "
                "one forward over the finished text"
            )
        old, new = record.trace, call.k[:, 0, :, 0]
        kept = min(old.shape[1], new.shape[1] - call.q.shape[2])
        if kept and not torch.equal(
            old[:, -kept:],
            new[:, new.shape[1] - call.q.shape[2] - kept : new.shape[1] - call.q.shape[2]],
        ):
            raise ReachError(
                f"the keys of {call.site.name} are other ones than before (beam search changes "
                "their places, a quantized cache their values), so sums over a generation cannot "
                "go on: watch with num_beams=1 and a plain cache, or watch one forward over the "
                "finished text"
            )
        return record

    def value(self, record: Record, fact: Fact) -> Any:
        """The result of one fact at one site; None where the fact does not apply.

        Raises:
            InputError: queries or keys on a GPU were not finite; elsewhere the call itself raises.
        """
        if record.total is not None:
            must_be_finite(record.total, record.site)
        facts = record.facts
        return fact.finish(record.sums[facts.index(fact)]) if fact in facts else None


def _must_be_tokens(call: Call) -> None:
    """Refuse a generation whose keys change their places from token to token."""
    if call.joint:
        dispatch.set_before_first_token(False)
        raise ReachError(
            f"{call.site.name} keeps other keys behind those of the tokens (an encoder's, or "
            "summaries of the text), whose places change with every token, so sums over a "
            "generation cannot go on: watch one forward over the finished text, without a cache"
        )


def must_be_finite(total: Tensor, site: Site) -> None:
    """Refuse a call whose queries and keys do not add up to a finite number."""
    if not bool(torch.isfinite(total)):
        raise InputError(
            f"the attention scores of {site.name} are not finite: the weights or the inputs hold "
            "NaN or inf"
        )


def _appended(old: Tensor | None, rows: int, new: Tensor | None, more: int) -> Tensor | None:
    """Which queries count, of the calls so far and of one more; None where all do."""
    known = old if old is not None else new
    if known is None:
        return None
    old, new = (
        known.new_ones(len(known), n) if live is None else live
        for live, n in ((old, rows), (new, more))
    )
    return torch.cat([old, new], 1)


def _looks_ahead(call: Call) -> bool:
    """Whether the first query sees the last key; a call of one query, which decodes, does not."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    corner = call.mask.cells(queries, keys, slice(0, 1), slice(keys - 1, keys))
    return queries > 1 and bool(corner.any())
