"""ACT: shrink the later attention sinks of chosen heads while the model runs.

Paper: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration", Yu et al., 2024, arXiv 2406.15765. The head lists that the
paper finds on training data are taken from the user; finding them is not built yet.

Deviations:
- The first token is spared by its position, padding left out; the released code spares the first
  hit, whatever it is.
- Decoding edits every new row properly; the released code's single-row case does not keep the row a
  distribution. The paper leaves decoding open: both modes here are ours.
- Every row of a batch has sinks of its own; the released code edits row 0 alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, MeanReceived, State, attend, mass, measure, rest, reweight
from regard.core.facts import Sums, View
from regard.errors import InputError
from regard.reach import Call, Handler, Site

Heads = Mapping[int, Sequence[int]]


@dataclass
class _Run:
    layer: int
    sinks: Tensor
    sums: Sums


@dataclass(eq=False)
class ACT(Handler):
    """Keep `beta` of the attention on later sinks; all other keys share the rest in proportion.

    A key is a sink of a head when its mean received attention exceeds `alpha / N` (N tokens; the
    paper), or the absolute `threshold` when one is given (the released code: 0.1).

    Args:
        beta: share kept on a sink, 0 to 1; 1 leaves the model as it is.
        alpha: relative threshold.
        threshold: absolute threshold instead, in (0, 1).
        heads: layer -> heads to change, or a JSON file of that; all heads when None.
        keep_first: leading tokens whose attention is never shrunk.
        skip_layers: numbers of first and of last layers left alone when `heads` is None.
        mode: while decoding, "prefill" keeps the sinks of the prompt, "dynamic" finds them anew.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> with torch.no_grad(), regard.apply(model, ACT(beta=0.4, skip_layers=(0, 0))):
    ...     model(torch.arange(12)[None]).logits.shape
    torch.Size([1, 12, 128])

    Raises:
        InputError: a setting out of range, a head or layer that this model does not have.
    """

    beta: float = 0.4
    alpha: float = 5.0
    threshold: float | None = None
    heads: Heads | str | Path | None = None
    keep_first: int = 1
    skip_layers: tuple[int, int] = (2, 1)
    mode: str = "prefill"
    _list: dict[int, list[int]] | None = field(default=None, init=False, repr=False)
    _runs: dict[int, _Run] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta is the share kept on a sink, from 0 to 1, not {self.beta}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise InputError(f"threshold lies between 0 and 1, not {self.threshold}")
        if self.alpha <= 0 or self.keep_first < 0:
            raise InputError("alpha is positive and keep_first not negative")
        if self.mode not in ("prefill", "dynamic"):
            raise InputError(f"mode is 'prefill' or 'dynamic', not {self.mode!r}")
        if isinstance(self.heads, (str, Path)):
            self._list = _read_heads(Path(self.heads))
        elif self.heads is not None:
            self._list = {int(n): [int(h) for h in heads] for n, heads in self.heads.items()}

    def sites(self, sites: list[Site]) -> list[Site]:
        own = [s for s in sites if s.kind == "self"]
        own = [s for s in own if s.part == own[-1].part] if own else []
        if not own:
            raise InputError("ACT needs self-attention, and this model has none")
        layers = [s.layer for s in own]
        if self._list is None:
            first, last = self.skip_layers
            return own[first : len(own) - last]
        wrong = sorted(set(self._list) - set(layers))
        if wrong:
            raise InputError(
                f"the head list names layer {wrong[0]}; this model has {len(own)} layers"
            )
        return [s for s in own if self._list.get(s.layer)]

    def after(self, call: Call, state: State) -> State | None:
        if self.beta == 1:
            return None
        chosen = self._chosen(call)
        few = _select(call, chosen)
        lse = state.lse[:, chosen]
        sinks = self._sinks(few, lse)
        if not bool(sinks.any()):
            return None
        edited = calibrate(few, State(state.out[:, chosen], lse), sinks, self.beta)
        out = state.out.clone()
        out[:, chosen] = edited.out
        return State(out, state.lse)

    def found(self) -> dict[int, Tensor]:
        """The sinks of the last run by layer, boolean `[batch, heads chosen, keys]`."""
        return {run.layer: run.sinks for run in self._runs.values()}

    def _chosen(self, call: Call) -> list[int]:
        count = call.q.shape[1]
        if self._list is None:
            return list(range(count))
        chosen = self._list[call.site.layer]
        wrong = [h for h in chosen if not 0 <= h < count]
        if wrong:
            raise InputError(
                f"the head list names head {wrong[0]} of layer {call.site.layer}; "
                f"this model has {count} heads"
            )
        return chosen

    def _sinks(self, call: Call, lse: Tensor) -> Tensor:
        """Which keys are sinks now, `[batch, heads, keys]`, on the map before any change."""
        run = self._runs.get(call.site.index) if call.query_offset else None
        end = call.key_offset + call.k.shape[2]
        if run is None or self.mode == "dynamic":
            fact, offsets = MeanReceived(), (call.query_offset, call.key_offset)
            settings: dict[str, Any] = {n: getattr(call, n) for n in ("softcap", "bias", "live")}
            sums = measure(
                call.q,
                call.k,
                lse,
                [fact],
                mask=call.mask,
                scale=call.scale,
                offsets=offsets,
                **settings,
            )[0]
            if run is not None:
                batch, heads, queries, _ = call.q.shape
                keys = call.k.shape[2]
                view = View(batch, heads, 1, queries, keys, *offsets, lse.dtype, lse.device)
                sums = fact.extend(run.sums, sums, view)
            run = _Run(call.site.layer, self._above(fact.finish(sums), sums), sums)
            self._runs[call.site.index] = run
        run.sinks = torch.nn.functional.pad(run.sinks, (0, end - run.sinks.shape[2]))
        return run.sinks[..., call.key_offset :]

    def _above(self, received: Tensor, sums: Sums) -> Tensor:
        """Keys above the bar that are neither padding nor among the first tokens."""
        real = sums["count"].flatten(1, 2) > 0  # some query may look at it: no padding
        bar = self.threshold or self.alpha / real.sum(-1, keepdim=True).clamp_min(1)
        return (received > bar) & real & (real.cumsum(-1) > self.keep_first)


def calibrate(call: Call, state: State, sinks: Tensor, beta: float) -> State:
    """Multiply the attention on `sinks` `[batch, heads, keys]` by beta, share the rest out; exact.

    The State over the sinks alone gathers their few keys; the State over the others is the
    difference, or a masked call where the sinks hold nearly all the mass.
    """
    part = _over(call, sinks)
    share = mass(part, state)

    def others() -> State:
        bias = torch.where(sinks, -1e30, 0.0)[:, :, None].to(state.lse.dtype)
        bias = bias.expand(*state.lse.shape, sinks.shape[2])
        full = bias if call.bias is None else bias + call.bias
        return call.change(bias=full).attend()

    left = rest(state, part, others, threshold=0.95)
    kept = beta * share
    alone = left.lse == -torch.inf  # a row that sees nothing but sinks has nobody to give to
    changed = reweight([part, left], [kept, 1 - kept])
    return State(torch.where(alone[..., None], state.out, changed.out), state.lse)


def _over(call: Call, sinks: Tensor) -> State:
    """State over the chosen keys of every head: gathered, as many as the head with the most has."""
    most = int(sinks.sum(-1).max())
    order = sinks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    queries, keys = call.q.shape[2], call.k.shape[2]
    allowed = call.mask.columns(queries, keys, order) & sinks.gather(-1, order)[:, :, None]
    k, v = (
        t.gather(2, order[..., None].expand(*order.shape, t.shape[-1])) for t in (call.k, call.v)
    )
    bias = call.bias
    if bias is not None:
        at = order[:, :, None].expand(*call.q.shape[:3], most)
        bias = bias.expand(*call.q.shape[:3], keys).gather(-1, at)
    mask = Mask.dense(allowed)
    return attend(call.q, k, v, mask=mask, scale=call.scale, softcap=call.softcap, bias=bias)


def _select(call: Call, heads: list[int]) -> Call:
    """The call of a few heads, each with keys of its own."""
    group = call.q.shape[1] // call.k.shape[1]
    of_key = [h // group for h in heads]
    bias = call.bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    learned = None if call.sinks is None else call.sinks[heads]
    return call.change(
        q=call.q[:, heads], k=call.k[:, of_key], v=call.v[:, of_key], bias=bias, sinks=learned
    )


def _read_heads(path: Path) -> dict[int, list[int]]:
    if not path.is_file():
        raise InputError(f"there is no head file {path}: make one by calibration, or give a dict")
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("heads", data)
        return {int(layer): [int(h) for h in heads] for layer, heads in data.items()}
    except (ValueError, AttributeError, TypeError) as problem:
        raise InputError(f'{path} is no head list: {{"layer": [heads]}} is expected') from problem
