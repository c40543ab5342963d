"""What the methods share that cut the prompt's keys and values once, after they were read: storage
of what each head keeps, decoding over it, and what the last queries looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, Received, State, measure
from regard.core.mask import Band
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Site

from .cache import MethodLayer, Rows, layers


class Group:
    """Some key heads of a layer and what they keep of the prompt, in one dense pair of tensors.

    Args:
        keys, values: of the prompt, `[batch, kv_heads, tokens, dim]`.
        heads: which key heads, `[batch, members]`; all of them when None.
        positions: which tokens, ascending, `[batch, members, kept]`; all of them when None.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        heads: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.prompt = keys.shape[2]
        self.heads = heads
        self.alike = heads is None or bool((heads == heads[:1]).all())
        # four bytes for each row that is held: the next larger type would double that
        self.positions = None if positions is None else positions.to(torch.int32)
        self.keys, self.values = (Rows(self._rows_of(x, positions)) for x in (keys, values))

    def _rows_of(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The rows `[batch, members, tokens or kept, dim]` of the group's heads."""
        rows = x if self.heads is None else self.of(x, self.heads)
        if positions is None:
            return rows
        return rows.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[-1]))

    def of(self, x: Tensor, heads: Tensor) -> Tensor:
        """The heads `[batch, some]` of `[batch, heads, tokens, dim]`."""
        if self.alike:
            return x[:, heads[0]]
        return x[torch.arange(len(x), device=x.device)[:, None], heads]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add new rows, given for all heads."""
        self.keys.append(self._rows_of(keys))
        self.values.append(self._rows_of(values))

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows' lists, in this order; the keys and values go their own way."""
        if self.heads is not None:
            self.heads = self.heads.index_select(0, rows.to(self.heads.device))
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def call(self, call: Call, length: int) -> Call:
        """The part of a call, made for all heads, that this group answers; `length` tokens were
        seen, the queries included.
        """
        k, v, queries = self.keys.data, self.values.data, call.q.shape[2]
        if self.heads is None and self.positions is None:
            return call.change(k=k, v=v)
        fields: dict[str, Any] = {}
        if self.heads is not None:
            groups = call.q.shape[1] // call.k.shape[1]
            wide = self.heads[..., None] * groups + torch.arange(groups, device=k.device)
            heads = wide.flatten(1)
            fields["q"] = self.of(call.q, heads)
            fields["heads"] = heads[0] if self.alike else heads
            if call.sinks is not None:
                fields["sinks"] = call.sinks[heads[0]]
        return call.change(
            k=k,
            v=v,
            # what was kept comes before every query, and new tokens follow in order
            mask=Mask.causal() if queries > 1 else Mask.full(),
            query_offset=length - queries,
            key_offset=0,
            positions=self._where(length),
            **fields,
        )

    def _where(self, length: int) -> Tensor:
        """Absolute position of every row held, `[batch, members, rows]`."""
        shape = self.keys.data.shape[:2]
        if self.positions is None:
            return torch.arange(length, device=self.keys.data.device).expand(*shape, -1)
        new = torch.arange(self.prompt, length, device=self.positions.device)
        return torch.cat([self.positions.long(), new.expand(*shape, -1)], -1)


class KeptLayer(MethodLayer):
    """A layer that holds, after the prompt, what each head kept of it and all later tokens."""

    def __init__(self, method: str) -> None:
        super().__init__(method)
        self.groups: list[Group] = []
        self.taken = False  # rows of the call that is to come

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.groups:
            self.row = keys.element_size() * (keys.shape[-1] + values.shape[-1])
            self.kv_heads = keys.shape[1]
        for group in self.groups:
            group.append(keys, values)
        self.taken = True
        return keys, values

    def stores(self) -> list[Rows]:
        return [rows for g in self.groups for rows in (g.keys, g.values)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for group in self.groups:
            group.select(beam_idx)

    def reset(self) -> None:
        self.groups, self.length = [], 0

    @property
    def full_nbytes(self) -> int:
        """Bytes that the keys and values of all tokens seen so far would take."""
        batch = len(self.groups[0].keys.data) if self.groups else 0
        return batch and batch * self.kv_heads * self.length * self.row


class Evicting(Handler):
    """Base of methods that cut the prompt's keys and values once.

    What the first forward pass over an empty cache reads is the prompt. Its outputs are those of
    the plain model; only afterwards each head keeps the rows that `choose` names, in order and with
    the rotary phase of their own positions. Later tokens, read one by one or several at once, are
    appended to every head and never dropped.
    """

    name = "this method"
    stores_rows = True

    def __post_init__(self) -> None:
        self._own: list[Site] = []
        self._found: dict[int, KeptLayer] = {}
        self._reads: int | None = None  # the layer whose prompt the call at hand is

    @property
    def neutral(self) -> bool:
        """Whether everything is kept, so that nothing can go wrong."""
        return False

    def choose(self, call: Call, state: State) -> list[Group]:
        """What the heads keep of the prompt in this call."""
        raise NotImplementedError

    def sites(self, sites: list[Site]) -> list[Site]:
        self_sites = [s for s in sites if s.kind == "self"]
        self._own = [s for s in self_sites if s.part == self_sites[-1].part] if self_sites else []
        if not self_sites:
            raise InputError(f"{self.name} needs self-attention, and this model has none")
        return self._own

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{self.name} compresses the prompt of a decoder, and {type(model).__name__} reads "
                "it in an encoder: use a causal language model"
            )
        return ()

    def generation(self, config: Any) -> None:
        if getattr(config, "prefill_chunk_size", None):
            raise InputError(
                f"{self.name} cuts the prompt once it has been read, and would take the first of "
                "several chunks for all of it: leave prefill_chunk_size out"
            )

    def cache(self, cache: Any) -> None:
        self._found = {}
        if cache is None:
            if self.neutral:
                return
            raise InputError(
                f"{self.name} shortens the key-value cache, and this forward pass has none: run a "
                "causal language model with use_cache=True"
            )
        method_layers = layers(cache, self._own, self.name, lambda _: KeptLayer(self.name))
        self._found = {n: x for n, x in method_layers.items() if isinstance(x, KeptLayer)}

    def before(self, call: Call) -> Call | Sequence[Call] | None:
        layer = self._found.get(call.site.layer)
        self._reads = None
        if layer is None or not layer.taken:  # a part of the model was called, without our cache
            return None
        layer.taken = False
        if not self.neutral:
            self._check(call, layer)
        if not layer.groups:
            self._reads = call.site.layer
            return None
        return [group.call(call, layer.length) for group in layer.groups]

    def after(self, call: Call, state: State) -> State | None:
        if self._reads == call.site.layer:
            with torch.no_grad():
                groups = self.choose(call, state)
            if call.sinks is not None and not all(group.alike for group in groups):
                raise InputError(
                    f"the heads of {call.site.name} have learned sinks, and the rows of this batch "
                    f"group their heads differently under {self.name}: run one sequence at a time"
                )
            self._found[call.site.layer].groups = groups
        return None

    def report(self) -> dict[str, Any]:
        """Plain data of the last run: the bytes held, and those of all rows."""
        return {"nbytes": self.nbytes, "full_nbytes": self.full_nbytes}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now, counted from storage; layers with a sliding window
        are not counted.
        """
        return sum(layer.nbytes for layer in self._found.values())

    @property
    def full_nbytes(self) -> int:
        """Bytes that the whole keys and values of the same layers and tokens would take."""
        return sum(layer.full_nbytes for layer in self._found.values())

    def _check(self, call: Call, layer: KeptLayer) -> None:
        """Refuse calls whose kept rows could not be told from the others."""
        if call.heads is not None or call.positions is not None:
            raise ReachError(
                f"another method lets the heads of {call.site.name} look at different keys "
                f"already: apply {self.name} without it"
            )
        if call.live is not None:
            raise InputError(
                f"{self.name} compresses unpadded prompts: give one prompt at a time, or prompts "
                "of one length"
            )
        if not _plain(call.mask, call.q.shape[2], layer.length) or call.bias is not None:
            raise InputError(
                f"{self.name} needs plain causal attention over one unpadded text, and that of "
                f"{call.site.name} has padding, a window, a prefix or a bias: leave "
                "past_key_values and attention_mask out, or use another model"
            )


def observed(call: Call, state: State, window: int | None) -> Tensor:
    """Mean attention that every key receives from the last `window` queries (all when None),
    float32 `[batch, heads, keys]`. Queries that see nothing are left out of the mean.
    """
    count = call.q.shape[2] if window is None else min(window, call.q.shape[2])
    lse = state.lse[:, :, -count:]
    total = measure(
        call.q[:, :, -count:],
        call.k,
        lse,
        [Received()],
        mask=call.mask,
        scale=call.scale,
        softcap=call.softcap,
        bias=None if call.bias is None else call.bias[:, :, -count:],
        live=None if call.live is None else call.live[:, -count:],
    )[0]["sum"].flatten(1, 2)
    real = lse > -torch.inf
    if call.live is not None:
        real = real & call.live[:, None, -count:]
    return total / real.sum(-1, keepdim=True).clamp_min(1)


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """The mean over the query heads of each key head: `[batch, kv_heads, ...]`."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)


def pooled(x: Tensor, kernel: int) -> Tensor:
    """Averages over `kernel` neighbours along the last axis of `[batch, heads, keys]`, as long.

    >>> pooled(torch.tensor([[[0.0, 3.0, 0.0, 0.0]]]), 3).tolist()
    [[[1.0, 1.0, 1.0, 0.0]]]
    """
    return torch.nn.functional.avg_pool1d(x, kernel, stride=1, padding=kernel // 2)


def ends_and_best(scores: Tensor, first: int, best: int, last: int) -> Tensor:
    """Positions of the first and last few keys and of the best between, ascending, `[batch, heads,
    first + best + last]`; among equals the earlier one.

    >>> ends_and_best(torch.tensor([[[9.0, 1.0, 3.0, 3.0, 2.0, 9.0]]]), 1, 2, 1).tolist()
    [[[0, 2, 3, 5]]]
    """
    tokens = scores.shape[-1]
    middle = scores[..., first : tokens - last]
    order = middle.sort(dim=-1, descending=True, stable=True).indices[..., :best] + first
    at = torch.arange(tokens, device=scores.device)
    ends = torch.cat([at[:first], at[tokens - last :]]).expand(*scores.shape[:2], -1)
    return torch.cat([ends, order], -1).sort(-1).values


def _plain(mask: Mask, queries: int, keys: int) -> bool:
    """Whether every query sees all tokens up to itself."""
    if not isinstance(mask, Band) or (mask.before is not None and mask.before < keys - 1):
        return False
    return mask.after == 0 or (queries == 1 and (mask.after is None or mask.after > 0))
