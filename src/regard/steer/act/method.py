"""ACT: shrink the later attention sinks of chosen heads while the model runs.

Paper: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration", Yu et al., 2024, arXiv 2406.15765. Which heads to change is
found on training data by `HeadFilter`.

Deviations:
- The first token is spared by its position, padding left out; the released code spares the first
  hit, whatever it is.
- Decoding edits every new row properly; the released code's single-row case does not keep the row a
  distribution. The paper leaves decoding open: both modes here are ours.
- Every row of a batch has sinks of its own; the released code edits row 0 alone.
"""

from __future__ import annotations

import json
import operator
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, MeanReceived, State, attend, mass, measure
from regard.errors import InputError
from regard.reach import Call, Handler, Site

from .card import Settings
from .picks import alike, lines, pick

BLOCK = 256  # queries whose complement is computed at once
MANY = 50  # tokens from which on a large share of sinks is worth a warning


@dataclass
class _Seen:
    """What is known of one head: by absolute position, `[batch, tokens so far]`."""

    layer: int
    sinks: Tensor
    total: Tensor
    count: Tensor

    def change(self, how: Any) -> None:
        self.sinks, self.total, self.count = map(how, (self.sinks, self.total, self.count))


@dataclass(eq=False)
class ACT(Settings, Handler):
    """Keep `beta` of the attention on later sinks; all other keys share the rest in proportion.

    A key is a sink of a head when its mean received attention exceeds `alpha / N` (N tokens; the
    paper), or the absolute `threshold` when one is given (the released code: 0.1). The relative bar
    falls with the length: on thousands of tokens it marks a tenth of them and more, which warns.

    With a method that keeps other keys for other heads, sinks are looked up by position. A key that
    such a method has dropped is left out of the running means from then on: nobody sees it.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> with torch.no_grad(), regard.apply(model, ACT(beta=0.4, skip_layers=(0, 0))):
    ...     model(torch.arange(12)[None]).logits.shape
    torch.Size([1, 12, 128])

    Raises:
        InputError: a setting out of range, a head or layer that this model does not have, a head
            file of another model, a cache whose prompt was read without ACT.
    """

    _list: dict[int, list[int]] | None = field(default=None, init=False, repr=False)
    _shape: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _seen: dict[tuple[int, int], _Seen] = field(default_factory=dict, init=False, repr=False)
    _cache: Any = field(default=None, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.skip_layers) != 2 or min(self.skip_layers) < 0:
            raise InputError(f"skip_layers are two numbers of layers, not {self.skip_layers}")
        if isinstance(self.heads, (str, Path)):
            self._list, self._shape = _read_heads(Path(self.heads))
        elif self.heads is not None:
            self._list = {int(n): [int(h) for h in heads] for n, heads in self.heads.items()}
        for layer, heads in (self._list or {}).items():
            if len(set(heads)) < len(heads):
                raise InputError(f"the head list names a head of layer {layer} twice")

    def sites(self, sites: list[Site]) -> list[Site]:
        self._seen.clear()
        own = [s for s in sites if s.kind == "self"]
        own = [s for s in own if s.part == own[-1].part] if own else []
        if not own:
            raise InputError("ACT needs self-attention, and this model has none")
        made = (self._shape or {}).get("layers", len(own))
        if made != len(own):
            raise InputError(
                f"the head file {self.heads} was made for a model of {made} layers "
                f"({self._shape}); this one has {len(own)}: calibrate this model"
            )
        first, last = self.skip_layers
        allowed = own[first : max(len(own) - last, 0)]
        if self._list is None:
            return allowed
        if not any(self._list.values()):
            warnings.warn("ACT: the head list names no head: nothing is changed", stacklevel=2)
        for layer in sorted(n for n, heads in self._list.items() if heads):
            if layer not in {s.layer for s in own}:
                raise InputError(
                    f"the head list names layer {layer}; this model has {len(own)} layers"
                )
            if layer not in {s.layer for s in allowed}:
                raise InputError(
                    f"the head list names layer {layer}, but ACT leaves the first {first} and the "
                    f"last {last} of the {len(own)} layers alone: take it out, or set "
                    "skip_layers=(0, 0)"
                )
        return [s for s in allowed if self._list.get(s.layer)]

    def cache(self, cache: Any) -> None:
        """In mode "dynamic" the running means follow the beams when the cache is reordered."""
        known = self._cache() if self._cache is not None else None
        if self.mode != "dynamic" or cache is None or cache is known:
            return
        plain, self._cache = cache.reorder_cache, weakref.ref(cache)

        def reorder(beam_idx: Tensor) -> None:
            plain(beam_idx)
            for seen in self._seen.values():
                seen.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

        cache.reorder_cache = reorder

    def after(self, call: Call, state: State) -> State | None:
        if self.beta == 1:
            return None
        names, local = self._chosen(call)
        if not names:
            return None
        of_key = torch.tensor(local, device=call.q.device) // (call.q.shape[1] // call.k.shape[1])
        few = _select(call, local)
        every = len(local) == call.q.shape[1]
        part = state if every else State(state.out[:, local], state.lse[:, local])
        where = _positions(call, of_key)
        if call.q.shape[2] > 1 or call.phase == "prefill" or self.mode == "dynamic":
            self._measure(few, part.lse, of_key, where, names)
        sinks = self._look_up(call, where, names)
        if not bool(sinks.any()):
            return None
        new = calibrate(few, part, sinks, self.beta, of_key)
        if every:
            return new
        out = state.out.clone()
        out[:, local] = new.out
        return State(out, state.lse)

    def found(self) -> dict[int, Tensor]:
        """The sinks of the last run by layer, boolean `[batch, heads, tokens]`: the chosen heads in
        ascending order.
        """
        layers: dict[int, list[Tensor]] = {}
        for _, seen in sorted(self._seen.items(), key=lambda item: item[0]):
            layers.setdefault(seen.layer, []).append(seen.sinks)
        return {layer: torch.stack(heads, 1) for layer, heads in layers.items()}

    def report(self) -> dict[str, Any]:
        """Plain data of the last run: by layer, how many heads have sinks, and the positions of
        the sinks with the number of heads, the most common first (batch row 0).
        """
        layers = []
        for layer, sinks in self.found().items():
            heads = sinks[0].sum(0)
            order = [n for n in heads.argsort(descending=True, stable=True).tolist() if heads[n]]
            layers.append(
                {
                    "layer": layer,
                    "heads": sinks.shape[1],
                    "heads_with_sinks": int(sinks[0].any(-1).sum()),
                    "sinks": [{"position": n, "heads": int(heads[n])} for n in order],
                }
            )
        return {"layers": layers}

    def _chosen(self, call: Call) -> tuple[list[int], list[int]]:
        """The heads to change that this call is about: their names in the module, their places in
        the call.
        """
        count = call.q.shape[1]
        if call.heads is not None and call.heads.dim() > 1:
            raise InputError(
                "ACT follows one list of heads, and the rows of this batch keep different heads "
                "whole: run one sequence at a time (batch size 1)"
            )
        present = list(range(count)) if call.heads is None else call.heads.tolist()
        if self._list is None:
            return present, list(range(count))
        wanted = self._list[call.site.layer]
        made = (self._shape or {}).get("heads", count)
        if call.heads is None and made != count:
            raise InputError(
                f"the head file {self.heads} was made for a model of {made} heads a layer "
                f"({self._shape}); this one has {count}: calibrate this model"
            )
        wrong = [h for h in wanted if h < 0 or (call.heads is None and h >= count)]
        if wrong:
            raise InputError(
                f"the head list names head {wrong[0]} of layer {call.site.layer}; "
                f"this model has {count} heads"
            )
        place = {name: n for n, name in enumerate(present)}
        names = [h for h in wanted if h in place]
        return names, [place[h] for h in names]

    def _measure(
        self, call: Call, lse: Tensor, of_key: Tensor, where: Tensor, names: list[int]
    ) -> None:
        """Add the received attention of this call, on the map before any change, and find the
        sinks.
        """
        received, rows = _received(call, lse, of_key)
        start, end = call.query_offset, call.query_offset + call.q.shape[2]
        new = received.new_zeros(2, *received.shape[:2], end)
        at = where.expand(2, *where.shape)
        new.scatter_add_(-1, at, torch.stack([received, rows.expand_as(received)]))
        sinks = self._above(*new)
        for n, head in enumerate(names):
            total, count = new[:, :, n]
            found = sinks[:, n]
            old = self._known(call, head) if start else None
            if old is not None and self.mode == "prefill":
                found = torch.cat([_fit(old.sinks, start), found[:, start:]], -1)
            elif old is not None:
                if old.sinks.shape[-1] > start:
                    raise InputError(
                        "the cache was cropped, and running means cannot forget tokens: use "
                        'mode="prefill"'
                    )
                total, count = total + _fit(old.total, end), count + _fit(old.count, end)
                found = self._above(total, count)
            self._seen[call.site.index, head] = _Seen(call.site.layer, found, total, count)
        if not start:
            self._warn(call.site.layer, sinks, new[1] > 0)

    def _above(self, total: Tensor, count: Tensor) -> Tensor:
        """Keys above the bar that are neither padding nor among the first tokens."""
        real = count > 0  # some query may look at it: no padding
        bar = self.threshold or self.alpha / real.sum(-1, keepdim=True).clamp_min(1)
        sinks = (total / count.clamp_min(1) > bar) & (count >= self.min_rows)
        return sinks & (real.cumsum(-1) > self.keep_first)

    def _look_up(self, call: Call, where: Tensor, names: list[int]) -> Tensor:
        """Which keys of the call are sinks, `[batch, heads, keys]`."""
        end = call.query_offset + call.q.shape[2]
        rows = [self._known(call, head).sinks for head in names]
        return torch.stack([_fit(r, end) for r in rows], 1).gather(-1, where)

    def _known(self, call: Call, head: int) -> _Seen:
        seen = self._seen.get((call.site.index, head))
        if seen is None or len(seen.total) != len(call.q):
            raise InputError(
                "the prompt in this cache was read without ACT, so its sinks are not known: "
                "apply ACT before the prompt is read"
            )
        return seen

    def _warn(self, layer: int, sinks: Tensor, real: Tensor) -> None:
        share = float(sinks.sum() / real.sum().clamp_min(1))
        if share > 0.1 and real.shape[-1] >= MANY and not self._warned:
            self._warned = True
            warnings.warn(
                f"ACT: {100 * share:.0f} % of the tokens are sinks in layer {layer}; the bar "
                "alpha / N falls with the length: raise alpha, or set threshold=0.1",
                stacklevel=2,
            )


def calibrate(
    call: Call, state: State, sinks: Tensor, beta: float, of_key: Tensor | None = None
) -> State:
    """Multiply the attention on `sinks` `[batch, heads, keys]` by beta, share the rest out; exact.

    With w the mass on the sinks and o_S their State's output, the edited output is
    `o + (1 - beta) * w / (1 - w) * (o - o_S)`: only the few sink columns are read. Where the sinks
    hold nearly all the mass the complement is computed by a masked call instead.

    Args:
        call: the heads to change.
        state: its State before the change.
        of_key: `[heads]`, the key head of each query head; grouped in order when None.
    """
    if of_key is None:
        of_key = torch.arange(call.q.shape[1], device=call.q.device)
        of_key = of_key // (call.q.shape[1] // call.k.shape[1])
    out = state.out.clone()
    for heads in alike(sinks, call.q.shape[2]):
        own, keys = _select(call, heads), of_key[heads]
        whole = State(state.out[:, heads], state.lse[:, heads])
        part = _over(own, sinks[:, heads], keys)
        share = mass(part, whole)
        odds = share / (1 - share).clamp_min(torch.finfo(share.dtype).eps)
        far = ((1 - beta) * odds)[..., None] * (whole.out - part.out).to(odds.dtype)
        edited = whole.out + far.to(out.dtype)
        for at, other in _complements(own, sinks[:, heads], keys, share > CLOSE):
            kept = (beta * share[at])[..., None]
            new = kept * part.out[at] + (1 - kept) * other.out[0, 0]
            # a row that sees nothing but sinks has nobody to give to
            alone = (other.lse[0, 0] == -torch.inf)[..., None]
            edited[at] = torch.where(alone, whole.out[at], new.to(out.dtype))
        out[:, heads] = edited
    return State(out, state.lse)


CLOSE = 0.95  # mass on the sinks from which on a difference loses digits


def _over(call: Call, sinks: Tensor, of_key: Tensor) -> State:
    """State over the sinks of every head: their few keys, gathered."""
    mask = pick(call.mask, sinks, call.q.shape[2])
    batch = torch.arange(len(sinks), device=of_key.device)[:, None, None]
    k, v = (t[batch, of_key[:, None], mask.order] for t in (call.k, call.v))
    bias = call.bias
    if bias is not None:
        at = mask.order[:, :, None].expand(*call.q.shape[:3], -1)
        bias = bias.expand(*call.q.shape[:3], sinks.shape[-1]).gather(-1, at)
    # one query needs no tiles; on a GPU no fused kernel takes a mask that differs by head
    kernel = "reference" if call.q.shape[2] == 1 else "tiled" if call.q.is_cuda else None
    return attend(
        call.q, k, v, mask=mask, scale=call.scale, softcap=call.softcap, bias=bias, kernel=kernel
    )


def _complements(
    call: Call, sinks: Tensor, of_key: Tensor, close: Tensor
) -> Iterator[tuple[tuple[int, int, Tensor], State]]:
    """(batch row, head, queries) and their State over all keys but the sinks, for `close` ones."""
    bias = None if call.bias is None else call.bias.expand(*call.q.shape[:3], -1)
    for b, h in close.any(-1).nonzero().tolist():
        for rows in close[b, h].nonzero()[:, 0].split(BLOCK):
            allowed = lines(call.mask, b, h, rows, (call.q.shape[2], call.k.shape[2]))
            keys = allowed.shape[-1]
            k, v = (t[b, of_key[h], :keys][None, None] for t in (call.k, call.v))
            one = call.change(
                q=call.q[b, h, rows][None, None],
                k=k,
                v=v,
                mask=Mask.dense(allowed & ~sinks[b, h, :keys]),
                bias=None if bias is None else bias[b, h, rows, :keys][None, None],
                sinks=None if call.sinks is None else call.sinks[h, None],
            )
            yield (b, h, rows), one.attend()


def _received(call: Call, lse: Tensor, of_key: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that every key of the call receives `[batch, heads, keys]`, and from how many
    queries it could `[batch, heads or 1, keys]`.
    """
    heads, groups = call.q.shape[1], call.q.shape[1] / call.k.shape[1]
    grouped = of_key.tolist() == [int(h / groups) for h in range(heads)] and groups == int(groups)
    k = call.k if grouped else call.k[:, of_key]
    settings: dict[str, Any] = {n: getattr(call, n) for n in ("softcap", "bias", "live")}
    fact = MeanReceived()
    sums = measure(call.q, k, lse, [fact], mask=call.mask, scale=call.scale, **settings)[0]
    return sums["sum"].flatten(1, 2), sums["count"].flatten(1, 2)


def _positions(call: Call, of_key: Tensor) -> Tensor:
    """Absolute position of every key, `[batch, heads, keys]`."""
    if call.positions is not None:
        return call.positions[:, of_key].clamp_min(0)
    keys = torch.arange(call.k.shape[2], device=call.k.device) + call.key_offset
    return keys.expand(len(call.k), len(of_key), -1)


def _select(call: Call, heads: list[int]) -> Call:
    """The call with a few of its query heads, and all its keys."""
    if len(heads) == call.q.shape[1]:
        return call
    bias = call.bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    learned = None if call.sinks is None else call.sinks[heads]
    mask = call.mask.of_heads(heads)
    return call.change(q=call.q[:, heads], bias=bias, sinks=learned, mask=mask)


def _fit(x: Tensor, length: int) -> Tensor:
    """`x` cut or filled up with zeros to so many positions."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]))


def _read_heads(path: Path) -> tuple[dict[int, list[int]], dict[str, Any] | None]:
    """The head list of a file, and the shape of the model it was made for where it says so."""
    if not path.is_file():
        raise InputError(
            f"there is no head file {path}: make one with `regard calibrate act`, or give a dict"
        )
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        shape = data.get("model") if "heads" in data else None
        heads = data.get("heads", data)
        return {int(layer): list(map(operator.index, own)) for layer, own in heads.items()}, shape
    except (ValueError, AttributeError, TypeError, RecursionError) as problem:
        raise InputError(f'{path} is no head list: {{"layer": [heads]}} is expected') from problem
