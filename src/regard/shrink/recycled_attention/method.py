"""Recycled Attention: decode over the tokens that the last full step looked at most.

Paper: "Recycled Attention: Efficient inference for long-context language models", Xu et al., 2024,
arXiv 2411.05787 (v2, 2025: "RefreshKV: Updating Small KV Cache During Long-form Generation").

Deviations:
- The papers leave open what we settle so: tokens written since the last full step have no score and
  are never dropped before those that have one; when all have gone, the oldest goes. Positions stay
  what they were. Neighbours are pooled over 7 positions where `pool=7` asks for it.
- The similarity of the dynamic stride is the mean cosine over all query heads, after rotation by
  position; in a batch all rows take a full step when one of them asks for it.
- Ties go to the most recent token.
- Several tokens at once (a new turn, for example) are a full step, from which the stride counts
  anew.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask
from regard.errors import InputError
from regard.parts.decoding.cache import MethodLayer, Rows, layers
from regard.reach import Call, Handler, Site

from .card import Settings

NAME = "Recycled"
FULL = Mask.full()
HIDDEN = 1 << 62  # how far below every score a key lies that the query may not see


@dataclass
class Steps:
    """What one layer did while the model wrote, after the prompt.

    Attributes:
        tokens: decoding steps of one token each; full: how many of them read every key.
        entries: keys read in all those steps, the mean over batch rows and key heads.
        visible: keys that there were to read in them.
        recovered: at every full step, the share of its attention that the kept keys and its own
            hold: what a recycled step would have had (mean over batch rows and heads).
    """

    tokens: int = 0
    full: int = 0
    entries: float = 0.0
    visible: float = 0.0
    recovered: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Recycled(Settings, Handler):
    """Read all keys at every `stride`-th token only, and in between the few kept ones.

    The kept keys of a key head are the `budget` that the last full step looked at most (the
    greatest weight over the query heads of the group). A step in between attends to them and to its
    own key, and nothing else is read: the copy of the kept rows is contiguous. No token is lost;
    the next full step reads and ranks them all. Time falls, memory does not.

    Layers with a sliding window stay as they are. A method that follows sinks looks them up by
    position.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> method = Recycled(budget=4, stride=3)
    >>> with regard.apply(model, method):
    ...     out = model.generate(torch.arange(3, 23)[None], max_new_tokens=7, do_sample=False)
    >>> method.steps()[0].full, method.entries_per_token  # of 6 tokens, two read 23 and 26 keys
    (2, 11.5)

    Raises:
        InputError: a setting out of range, a model that does not write from left to right, a cache
            that was filled without the method, another method that stores keys in its own way.
    """

    _sites: list[Site] = field(default_factory=list, init=False, repr=False)
    _steps: dict[int, Steps] = field(default_factory=dict, init=False, repr=False)
    _layers: Any = field(default_factory=weakref.WeakValueDictionary, init=False, repr=False)
    _causal: bool = field(default=False, init=False, repr=False)

    stores_rows = True

    def __getstate__(self) -> dict[str, Any]:
        # the layers belong to a cache of this process
        return {name: value for name, value in vars(self).items() if name != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _layers=weakref.WeakValueDictionary())

    # -- read-outs ---------------------------------------------------------------------------------
    def steps(self) -> dict[int, Steps]:
        """What each layer did after the last prompt."""
        return dict(sorted(self._steps.items()))

    def report(self) -> dict[str, Any]:
        """Plain data of the last run: keys read a token, the attention that the kept keys held at
        full steps, and by layer how many steps read all keys.
        """
        layers = [
            {
                "layer": number,
                "tokens": log.tokens,
                "full_steps": log.full,
                "entries_per_token": log.entries / log.tokens if log.tokens else None,
                "recovered": log.recovered,
            }
            for number, log in self.steps().items()
        ]
        tokens = sum(log.tokens for log in self._steps.values())
        visible = sum(log.visible for log in self._steps.values())
        return {
            "entries_per_token": self.entries_per_token if tokens else None,
            "full_entries_per_token": visible / tokens if tokens else None,
            "recovered": self.recovered,
            "layers": layers,
        }

    @property
    def entries_per_token(self) -> float:
        """Keys read by a key head for a written token, the mean over layers; 0 before any."""
        tokens = sum(s.tokens for s in self._steps.values())
        return sum(s.entries for s in self._steps.values()) / tokens if tokens else 0.0

    @property
    def recovered(self) -> float | None:
        """The share of a full step's attention that recycling would have kept, the mean over full
        steps and layers; None before any.
        """
        shares = [x for s in self._steps.values() for x in s.recovered]
        return sum(shares) / len(shares) if shares else None

    # -- the run -----------------------------------------------------------------------------------
    def sites(self, sites: list[Site]) -> list[Site]:
        own = [s for s in sites if s.kind == "self"]
        if not own:
            raise InputError("Recycled needs self-attention, and this model has none")
        self._sites = [s for s in own if s.part == own[-1].part]
        self._causal = False
        return self._sites

    def cache(self, cache: Any) -> None:
        """Put layers of this method into an empty cache."""
        self._layers.clear()
        if cache is None:
            return
        own = getattr(cache, "self_attention_cache", cache)  # of an encoder and a decoder
        self._layers.update(layers(own, self._sites, NAME, self._make))

    def _make(self, site: Site) -> MethodLayer:
        self._steps[site.layer] = Steps()
        return _Layer(self._steps[site.layer])

    def before(self, call: Call) -> Call | None:
        layer: _Layer | None = self._layers.get(call.site.layer)
        if not self._causal:
            self._check(call)
        if layer is None:
            return None
        if call.heads is not None:
            raise InputError("Recycled comes before methods that split the heads: apply it first")
        if call.q.shape[2] > 1 or layer.length == 1:
            layer.start()
            return None
        layer.count += 1
        layer.full = layer.kept is None or self._due(layer, call.q)
        if layer.full:
            return None
        layer.take(call, self.budget)
        if layer.length <= self.budget + (self.evict == "last_full"):  # every key is there
            layer.note(_visible(call), _visible(call), False)
            return None
        return layer.shown(call)

    def after(self, call: Call, state: Any) -> None:
        layer: _Layer | None = self._layers.get(call.site.layer)
        if layer is None:
            return
        if not layer.full:
            if self.evict == "current" and call.positions is not None:
                layer.lowest = _lowest(call, state.lse)
            return
        if layer.count:
            layer.note(_visible(call), _visible(call), True)
        if self.query_check is None and self.stride == 1:
            return
        last, lse, allowed = _last(call, state.lse)
        row = _row(last, lse, allowed)
        if layer.count and layer.positions is not None:
            layer.log.recovered.append(layer.mass(row, self.budget))
        if self.query_check is not None:
            layer.query = last.q.detach().clone()
        kept = self._choose(layer, call, row, allowed)
        if kept is not None:
            layer.keep(kept)

    def _choose(
        self, layer: _Layer, call: Call, row: Tensor, allowed: Tensor | None
    ) -> Tensor | None:
        """Positions to keep `[batch, kv_heads, kept]` after a full step, the best first; None
        leaves the kept ones as they are.
        """
        return _rank(row, allowed, self.budget, self.pool)

    def _due(self, layer: _Layer, q: Tensor) -> bool:
        """Whether this step reads every key."""
        if self.query_check is None:
            return layer.count % self.stride == 0
        if layer.query is None or layer.count % self.query_check:
            return layer.query is None
        alike = torch.cosine_similarity(q.float(), layer.query.float(), dim=-1).mean((1, 2))
        return bool((alike <= self.threshold).any())

    def _check(self, call: Call) -> None:
        """Refuse a model whose first token sees its last one."""
        size = (call.q.shape[2], call.k.shape[2])
        if size[0] == 1:
            return
        if bool(call.mask.cells(*size, slice(0, 1), slice(size[1] - 1, size[1])).any()):
            raise InputError(
                "Recycled acts while a model writes from left to right, and this one looks both "
                "ways: it has nothing to recycle"
            )
        self._causal = True


class _Layer(MethodLayer):
    """All rows of a layer, and a contiguous copy of the kept ones.

    The kept rows lie in descending order of their score, so the one to drop is the last that still
    has a score: new rows overwrite the copy from its end on, in the same place for every head.
    """

    def __init__(self, log: Steps) -> None:
        super().__init__(NAME)
        self.log = log
        self.rows: tuple[Rows, Rows] | None = None
        self.kept: tuple[Rows, Rows] | None = None
        self.positions: Rows | None = None
        self.query: Tensor | None = None  # of the last full step
        self.lowest: Tensor | None = None  # the row to drop where heads differ
        self.count = 0  # tokens since the prompt
        self.since = 0  # tokens since the last full step
        self.scored = 0  # kept rows at the last full step
        self.full = True

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            self.rows = (Rows(keys.detach()), Rows(values.detach()))
            return keys, values
        return self.rows[0].append(keys.detach()), self.rows[1].append(values.detach())

    def stores(self) -> list[Rows]:
        found = [*(self.rows or ()), *(self.kept or ())]
        return found if self.positions is None else [*found, self.positions]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.query is not None:
            self.query = self.query.index_select(0, beam_idx.to(self.query.device))
        if self.lowest is not None:
            self.lowest = self.lowest.index_select(0, beam_idx.to(self.lowest.device))

    def start(self) -> None:
        """The next call reads a prompt."""
        self.full, self.count = True, 0

    def slot(self, budget: int) -> int:
        """Where the next own row goes: behind the kept ones, then over the lowest, then the
        oldest.
        """
        turn = self.since % (budget + 1)
        return self.scored + turn if turn <= budget - self.scored else budget - turn

    def take(self, call: Call, budget: int) -> None:
        """Add the newest row to the kept ones, over the one that was dropped."""
        assert self.kept is not None and self.positions is not None
        k, v = call.k[:, :, -1:].detach(), call.v[:, :, -1:].detach()
        if len(self.positions) <= budget:
            for rows, new in zip(self.kept, (k, v)):
                rows.append(new)
            self.positions.append(k.new_full((*k.shape[:3], 1), self.length - 1, dtype=torch.long))
        elif self.lowest is not None:
            at = self.lowest[..., None, None]
            for rows, new in zip(self.kept, (k, v)):
                rows.data.scatter_(2, at.expand(new.shape), new)
            self.positions.data.scatter_(2, at, self.length - 1)
        else:
            place = self.slot(budget)
            for rows, new in zip(self.kept, (k, v)):
                rows.data[:, :, place] = new[:, :, 0]
            self.positions.data[:, :, place] = self.length - 1
        self.since += 1

    def shown(self, call: Call) -> Call:
        """The call over the kept rows alone."""
        assert self.kept is not None and self.positions is not None
        positions = self.positions.data[..., 0]
        mask, bias, entries = FULL, call.bias, float(positions.shape[-1])
        groups = call.q.shape[1] // call.k.shape[1]
        if not _open(call):
            mask, entries = _gathered(call, positions)
        if bias is not None:
            at = positions.repeat_interleave(groups, 1)[:, :, None]
            bias = bias.expand(len(at), at.shape[1], 1, -1).gather(-1, at)
        self.note(entries, _visible(call), False)
        k, v = (rows.data for rows in self.kept)
        return call.change(k=k, v=v, mask=mask, bias=bias, positions=positions)

    def keep(self, chosen: Tensor) -> None:
        """Copy these rows `[batch, kv_heads, kept]`, the best first, as a full step ends."""
        assert self.rows is not None
        at = chosen[..., None]
        found = [rows.pick(chosen) for rows in self.rows]
        if self.kept is None or self.positions is None or len(self.positions) < at.shape[2]:
            self.kept, self.positions = (Rows(found[0]), Rows(found[1])), Rows(at.contiguous())
        else:
            for rows, new in zip((*self.kept, self.positions), (*found, at)):
                rows.crop(len(rows) - at.shape[2])
                rows.data.copy_(new)
        self.since, self.scored, self.lowest = 0, chosen.shape[-1], None

    def mass(self, row: Tensor, budget: int) -> float:
        """Attention of a full step's row `[batch, kv_heads, groups, keys]` on what a recycled step
        would have read.
        """
        assert self.positions is not None
        at = self.positions.data[..., 0]
        held = row.gather(-1, at[:, :, None].expand(*row.shape[:3], -1))
        share = held.sum(-1) + row[..., -1]
        if len(self.positions) > budget:  # the next row takes the place of one
            if self.lowest is not None:
                drop = self.lowest[:, :, None, None].expand(*row.shape[:3], 1)
                share = share - held.gather(-1, drop)[..., 0]
            else:
                share = share - held[..., self.slot(budget)]
        return min(float(share.mean()), 1.0)

    def note(self, entries: float, visible: float, full: bool) -> None:
        """Write down a step."""
        self.log.tokens += 1
        self.log.full += full
        self.log.entries += entries
        self.log.visible += visible


def _open(call: Call) -> bool:
    """Whether a single query sees every key."""
    return call.mask.is_full(1, call.k.shape[2])


def _visible(call: Call) -> float:
    """How many keys a single query sees, the mean over batch rows."""
    if _open(call):
        return float(call.k.shape[2])
    return float(call.mask.cells(1, call.k.shape[2]).sum(-1).float().mean())


def _gathered(call: Call, positions: Tensor) -> tuple[Mask, float]:
    """The row of a mask over picked keys `[batch, kv_heads, keys]`, and how many it shows."""
    batch, heads = call.q.shape[:2]
    row = call.mask.cells(1, call.k.shape[2], device=positions.device)[:, :, 0]
    at = positions.repeat_interleave(heads // positions.shape[1], 1)
    seen = row.expand(batch, heads, -1).gather(-1, at)
    if bool(seen.all()):
        return FULL, float(at.shape[-1])
    return Mask.dense(seen[:, :, None]), float(seen.sum(-1).float().mean())


def _last(call: Call, lse: Tensor) -> tuple[Call, Tensor, Tensor | None]:
    """The call of the last query that is no padding, its lse, and the keys it sees (None: all),
    `[batch or 1, heads or 1, keys]`.
    """
    count, keys = call.q.shape[2], call.k.shape[2]
    if count == 1:
        allowed = None if _open(call) else call.mask.cells(1, keys, device=lse.device)[:, :, 0]
        return call, lse, allowed
    bias = call.bias
    if call.live is None or bool(call.live[:, -1].all()):
        cells = call.mask.cells(count, keys, slice(count - 1, count), device=lse.device)[:, :, 0]
        last = call.change(q=call.q[:, :, -1:], bias=None if bias is None else bias[:, :, -1:])
        return last, lse[:, :, -1:], None if bool(cells.all()) else cells
    order = torch.arange(1, count + 1, device=call.live.device)
    at = (call.live * order).argmax(-1).tolist()
    batch = range(len(at))
    rows = [call.mask.cells(count, keys, slice(n, n + 1), device=lse.device)[:, :, 0] for n in at]
    cells = torch.cat([rows[b][min(b, len(rows[b]) - 1)][None] for b in batch])
    if bias is not None:
        wide = bias.expand(len(at), *bias.shape[1:])
        bias = torch.stack([wide[b, :, n, None] for b, n in enumerate(at)])
    q = torch.stack([call.q[b, :, n, None] for b, n in enumerate(at)])
    own = torch.stack([lse[b, :, n, None] for b, n in enumerate(at)])
    return call.change(q=q, bias=bias), own, cells


def _row(call: Call, lse: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention of a single query, `[batch, kv_heads, groups, keys]`, at least float32."""
    batch, kv_heads, keys, dim = call.k.shape
    kind = torch.promote_types(call.q.dtype, torch.float32)
    groups = (batch, kv_heads, call.q.shape[1] // kv_heads)
    q = call.q.detach().to(kind).reshape(*groups, dim) * call.scale
    row = q @ call.k.detach().to(kind).transpose(-1, -2)
    if call.softcap is not None:
        row = call.softcap * torch.tanh(row / call.softcap)
    if call.bias is not None:
        row = row + call.bias.expand(batch, call.q.shape[1], 1, keys).reshape(row.shape)
    row = (row - lse.detach().to(kind).reshape(*groups, 1)).exp_()
    if allowed is not None:
        row = row.masked_fill(~_wide(allowed, row), 0)
    return row


def _wide(allowed: Tensor, row: Tensor) -> Tensor:
    """`[batch or 1, heads or 1, keys]` in the shape of a row."""
    if allowed.shape[1] == 1:
        return allowed[:, :, None].expand(row.shape)
    return allowed.expand(len(row), -1, -1).reshape(row.shape)


def _order(scores: Tensor, positions: Tensor) -> Tensor:
    """Scores of at least 0 as whole numbers that sort alike, the later of two equal ones higher."""
    bits = scores.float().contiguous().view(torch.int32).long()
    return (bits << 32) | positions


def _rank(row: Tensor, allowed: Tensor | None, budget: int, pool: int | None) -> Tensor:
    """The kept positions `[batch, kv_heads, kept]`, the best first; hidden ones come last."""
    scores = row.amax(2)
    if pool is not None:
        scores = torch.nn.functional.max_pool1d(scores, pool, 1, pool // 2)
    keys = row.shape[-1]
    order = _order(scores, torch.arange(keys, device=row.device))
    if allowed is not None:
        order = order - HIDDEN * (~_wide(allowed, row).any(2)).long()
    return order.topk(min(budget, keys)).indices


def _lowest(call: Call, lse: Tensor) -> Tensor:
    """Which row of a recycled step has the least attention, `[batch, kv_heads]`."""
    assert call.positions is not None
    allowed = None
    if not _open(call):
        allowed = call.mask.cells(1, call.k.shape[2], device=lse.device)[:, :, 0]
    row = _row(call, lse, allowed)
    order = _order(row.amax(2), call.positions)
    if allowed is not None:
        order = order - HIDDEN * (~_wide(allowed, row).any(2)).long()
    return order.argmin(-1)
