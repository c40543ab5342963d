"""A model whose sequence is dealt out to ranks: each runs it on its own rows, and attention is
shared.

All else in a decoder works on one token at a time, so rows may lie anywhere as long as each knows
its position. Whether that holds for a model is proved on the first tokens before it is relied on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from regard.core import Fact, Mask, State, merge
from regard.core.mask import Band
from regard.core.parallel import Parallel, measure
from regard.core.parallel.facts import check
from regard.errors import InputError, ReachError

from .call import Call, Handler
from .collect import Collector, Record, must_be_finite
from .session import Session

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest output; 0.1 for the others
_STRETCHED = {"dynamic", "longrope"}  # rotary scales that depend on the longest position at hand


@dataclass(frozen=True)
class SharedCall(Call):
    """A call of one rank's rows, whose keys lie on all ranks; `whole` is the mask over all."""

    run: Parallel | None = None
    whole: Mask | None = None

    def attend(self) -> State:
        assert self.run is not None
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        state = self.run.attend(self.q, self.k, self.v, mask=self.whole, **options)
        if self.sinks is None:
            return state
        learned = self.sinks.to(state.lse.dtype)[None, :, None].expand(state.lse.shape)
        return merge(state, State(torch.zeros_like(state.out), learned))


class Shared(Handler):
    """Lets every attention call run over all ranks."""

    def __init__(self, run: Parallel) -> None:
        self.run = run

    def before(self, call: Call) -> Call:
        name, run = call.site.name, self.run
        if call.site.kind != "self":
            raise ReachError(f"{name} is a cross attention, which context parallelism cannot share")
        if call.bias is not None:
            raise ReachError(
                f"{name} adds a bias to its scores, which would be a matrix over all ranks: watch "
                "this model in one process"
            )
        if not isinstance(call.mask, Band):
            raise ReachError(
                f"the mask of {name} is neither causal nor a window, so its meaning over all ranks "
                "is not known: watch this model in one process"
            )
        if call.query_offset or call.q.shape[2] != run.placement.local:
            raise ReachError("context parallelism sees one forward over the text, without a cache")
        known = {f.name: getattr(call, f.name) for f in fields(Call)}
        return SharedCall(**known, run=run, whole=call.mask)


class SharedCollector(Collector):
    """Facts of the whole sequence, on every rank, from the rows of each."""

    def __init__(
        self,
        facts: Sequence[Fact],
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        part: str | None = None,
    ) -> None:
        try:
            check(facts)
        except ValueError as error:
            raise InputError(str(error)) from None
        super().__init__(facts, layers, heads, part)

    def measures(self, call: Call) -> None:
        return None  # the rows of a call lie on several ranks

    def after(self, call: Call, state: State) -> State | None:
        assert isinstance(call, SharedCall) and call.run is not None
        total = call.run.comm.sum(call.q.sum(dtype=torch.float32) + call.k.sum())
        must_be_finite(total, call.site)  # the same on every rank, so that all stop
        options: dict[str, Any] = {
            "scale": call.scale,
            "softcap": call.softcap,
            "sinks": call.sinks,
        }
        sums = measure(call.run, call.q, call.k, state.lse, self.facts, mask=call.whole, **options)
        tokens = call.run.tokens
        assert isinstance(call.whole, Band)
        causal = call.whole.after is not None and call.whole.after <= 0
        trace = call.k[:, :0, 0, 0]  # there is no cache to follow
        self.records[call.site.index] = Record(
            call.site, sums, tokens, tokens, tokens, trace, causal, self.facts
        )
        return None

    def value(self, record: Record, fact: Fact) -> Any:
        value = super().value(record, fact)
        if self.heads is None or value is None:
            return value
        wrong = [h for h in self.heads if not 0 <= h < value.shape[1]]
        if wrong:
            raise InputError(f"head {wrong[0]} is out of range: there are {value.shape[1]} heads")
        return value[:, self.heads]


def forward(model: Any, run: Parallel, ids: Tensor, **keywords: Any) -> Any:
    """The model on this rank's rows of `ids` `[batch, tokens]`; for a `Shared` session."""
    local = run.dispatch(ids, 1)
    at = run.positions.clamp_min(0).to(ids.device).expand(len(ids), -1)
    # told that all are tokens, the model does not take the jumps of positions for documents
    return model(
        input_ids=local,
        attention_mask=torch.ones_like(local),
        position_ids=at,
        use_cache=False,
        **keywords,
    )


def suits(model: Any) -> None:
    """Refuse a model whose rows cannot be dealt out.

    Raises:
        ReachError: no position ids, an encoder-decoder, or positions that depend on the length.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ReachError(f"{name} has an encoder and a decoder: context parallelism takes decoders")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ReachError(
            f"{name} takes no position_ids, so its rows cannot lie on different ranks: watch it in "
            "one process"
        )
    stretched = set(_rope_types(model.config.to_dict())) & _STRETCHED
    if stretched:
        raise ReachError(
            f"the rotary positions of {name} ({', '.join(sorted(stretched))}) depend on the length "
            "at hand, which no rank knows: watch it in one process"
        )


def prove(model: Any, run: Parallel, ids: Tensor, tokens: int | None = None) -> float:
    """Largest difference between ranks together and one process on the first tokens, as a share.

    Raises:
        ReachError: they differ: tokens mix outside of attention, or the ranks hold other weights.
    """
    size = min(ids.shape[1], tokens or 16 * run.grid.ranks)
    start = ids[:, :size]
    small = Parallel(run.grid, size, comm=run.comm)
    with torch.no_grad():
        reference = small.dispatch(model(input_ids=start, use_cache=False)[0], 1)
        with Session(model, [Shared(small)]):
            out = forward(model, small, start)[0]
    real = (small.positions >= 0).to(out.device)
    error = (out - reference)[:, real].abs().max() if bool(real.any()) else out.new_zeros(())
    whole = torch.stack(run.comm.gather_all(torch.stack([error, reference.abs().max()]).double()))
    if not bool(torch.isfinite(whole).all()):
        raise InputError(
            f"{type(model).__name__} produced NaN or inf: check its weights and inputs"
        )
    off = float(whole[:, 0].max() / whole[:, 1].max().clamp_min(1e-30))
    if not off < TOLERANCE.get(out.dtype, 0.1):
        raise ReachError(
            f"{type(model).__name__} on {run.grid.ranks} ranks differs from one process by "
            f"{off:.1e} on the first {size} tokens: it mixes tokens outside its attention, or the "
            "ranks hold different weights; load the same everywhere, or watch it in one process"
        )
    return off


def _rope_types(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                yield value
            else:
                yield from _rope_types(value)
