"""The mixers as modules: each takes the normed input of its layer and a `Step`, and gives what is
added to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from regard.core import Mask
from regard.errors import InputError, ReachError

from .kinds import KINDS, Kind
from .look import Map
from .operations import operate
from .recurrent import Scan, scan, second_order, separate_orders, summed

Pair = tuple[Tensor, Tensor]


@dataclass
class Step:
    """What a forward pass hands to every mixer.

    Attributes:
        mask: as the model's attention function takes it.
        pairs: the same as a description, over all keys.
        live: `[batch, keys]`, false for padding; None where all are tokens.
        positions: `[batch or 1, queries]`.
        rotary: cosines and sines; None without rotary positions.
        table: bias of the score by distance, `[heads, reach]`.
        embeds: embeddings of the tokens at hand.
        streams: queries and keys of the second streams, by layer, `[1, heads, length, head_dim]`.
        tokens: key and value of the learned first token, by layer, `[1, kv_heads, 1, head_dim]`.
    """

    mask: Any
    pairs: Mask
    live: Tensor | None
    positions: Tensor
    rotary: Pair | None
    table: Tensor | None
    embeds: Tensor
    cache: Cache | None = None
    streams: dict[int, Pair] = field(default_factory=dict)
    tokens: dict[int, Pair] = field(default_factory=dict)

    def new(self, queries: int) -> Tensor | None:
        """`live` of the tokens at hand."""
        return None if self.live is None else self.live[:, -queries:]


class Mixer(nn.Module):
    """Queries and keys of a layer, and the cache it keeps them in."""

    is_causal = True
    rotates = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.mixer: str = config.mixers[layer_idx]
        self.kind: Kind = KINDS[self.mixer]
        self.head_dim = int(config.head_dim)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        bias = config.layout == "qwen2" or config.attention_bias
        self._make(config.hidden_size, bias)
        if config.layout == "qwen3":
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _make(self, width: int, bias: bool) -> None:
        size, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, size, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(size, width, bias=self.config.attention_bias)

    def split(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` as `[batch, heads, tokens, head_dim]`."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def queries_keys(self, x: Tensor, step: Step) -> Pair:
        """From the source of this kind, normalised and rotated."""
        stream = step.streams.get(self.layer_idx)
        if stream is not None:
            places = step.positions.expand(len(x), -1)
            return at(stream[0], places), at(stream[1], places)
        q, k = self.split(self.q_proj(x)), self.split(self.k_proj(x))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates and step.rotary is not None:
            q, k = apply_rotary_pos_emb(q, k, *step.rotary)
        return q, k

    def remember(self, k: Tensor, v: Tensor, step: Step) -> Pair:
        """Keys and values with those of earlier tokens."""
        if step.cache is None:
            return k, v
        return step.cache.update(k, v, self.layer_idx)

    def join(self, out: Tensor) -> Tensor:
        """`[batch, heads, tokens, head_dim]` through the output projection."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def map(self, x: Tensor, step: Step) -> Map | None:
        """Queries and keys of this call, to look at, without a cache; None where no token sees
        another.
        """
        q, k = self.queries_keys(x, step)
        return Map(q, k, step.pairs, self.scaling, table=step.table)

    def state(self, step: Step) -> Any:
        """The layer of the cache that keeps a state; None without a cache."""
        return None if step.cache is None else step.cache.layers[self.layer_idx]


class Attention(Mixer):
    """Softmax attention by the model's own (fused) function: from any source of queries and keys,
    with any learned bias.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = 1 if config.bias_shared else self.kv_heads
        shape = (heads, self.head_dim)
        if self.kind.bias in ("k", "kv"):
            self.key_bias = nn.Parameter(torch.empty(shape))
        if self.kind.bias in ("v", "kv"):
            self.value_bias = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        source = self.source(x, step)
        q, k = self.queries_keys(source, step)
        v = self.split(self.v_proj(x))
        if self.kind.source in ("noise", "text") and step.streams:
            k, v = self._shared(k, v, step)
        else:
            k, v = self.remember(k, v, step)
        q, k, v, mask, drop = self._extended(q, k, v, step)
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = function(self, q, k, v, mask, dropout=dropout, scaling=self.scaling)
        out = out[:, drop:]
        if self.kind.bias == "v":
            out = out + self.biases(self.value_bias, 1)[:, :, 0].repeat_interleave(
                self.num_key_value_groups, 1
            )
        return self.o_proj(out.flatten(2))

    def map(self, x: Tensor, step: Step) -> Map | None:
        q, k = self.queries_keys(self.source(x, step), step)
        extra = self.extra(step, k)
        if extra is None:
            return Map(q, k, step.pairs, self.scaling, table=step.table)
        k = torch.cat([extra[0], k], 2)  # aligned at the end, so the first key is seen by all
        return Map(q, k, step.pairs | Mask.prefix(1), self.scaling, table=step.table, extra=True)

    def source(self, x: Tensor, step: Step) -> Tensor:
        """What queries and keys are computed from, where that is no second stream."""
        return step.embeds if self.kind.source == "embedding" else x

    def biases(self, bias: Tensor, batch: int) -> Tensor:
        """A learned vector of every key head as one token, `[batch, kv_heads, 1, head_dim]`."""
        return bias.expand(self.kv_heads, -1)[None, :, None].expand(batch, -1, -1, -1)

    def extra(self, step: Step, like: Tensor) -> Pair | None:
        """Key and value of the token that stands before the sequence, if there is one."""
        batch = len(like)
        if self.kind.bias == "token" and self.layer_idx in step.tokens:
            k, v = step.tokens[self.layer_idx]
            return k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
        if self.kind.bias not in ("k", "kv"):
            return None
        key = self.biases(self.key_bias, batch).to(like.dtype)
        if self.kind.bias == "kv":
            return key, self.biases(self.value_bias, batch).to(like.dtype)
        value = torch.zeros_like(key)
        if self.config.bias_value == "first":
            value[..., 0] = self.config.bias_norm
        elif self.config.bias_value == "all":
            value += self.config.bias_norm / self.head_dim**0.5
        return key, value

    def _extended(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Any:
        """The call with the extra key first, and how many queries to drop of the result.

        Where the mask is plain causal a blank query goes before the others, and it stays so.
        """
        extra, mask = self.extra(step, k), step.mask
        if extra is None:
            return q, k, v, mask, 0
        k, v = torch.cat([extra[0], k], 2), torch.cat([extra[1], v], 2)
        if torch.is_tensor(mask):
            visible = mask.dtype == torch.bool or mask.dim() == 2
            mask = F.pad(mask, (1, 0), value=1.0 if visible else 0.0)
            if step.table is not None and self.kind.bias == "token":
                mask[..., 0] += step.table[:, step.positions + 1].transpose(0, 1).to(mask.dtype)
            return q, k, v, mask, 0
        if mask is not None:
            raise ReachError(
                f"{self.mixer} with this mask needs another attention function: load the model "
                'with attn_implementation="sdpa"'
            )
        if q.shape[2] == 1:
            return q, k, v, mask, 0
        return F.pad(q, (0, 0, 1, 0)), k, v, mask, 1

    def _shared(self, k: Tensor, v: Tensor, step: Step) -> Pair:
        """Values are kept for each sequence; keys are read off the second stream."""
        layer = self.state(step)
        if layer is None:
            return k, v
        positions = step.positions.expand(len(v), -1)
        if layer.state:
            v = torch.cat([layer.state["values"], v], 2)
            positions = torch.cat([layer.state["positions"], positions], 1)
        layer.put(step.positions.shape[1], values=v, positions=positions)
        return at(step.streams[self.layer_idx][1], positions), v


class Operation(Mixer):
    """Another function of the scores than softmax, tile by tile."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if self.kind.features == "mlp":
            self.map_in = nn.Linear(self.head_dim, self.head_dim, bias=False)
            self.map_out = nn.Linear(self.head_dim, self.head_dim, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k = self.mapped(*self.queries_keys(x, step))
        v = self.split(self.v_proj(x))
        if self.kind.form == "taylor" and self.config.taylor == "joint":
            return self.join(self._recurrent(q, k, v, step))
        k, v = self.remember(k, v, step)
        if self.kind.form == "taylor":
            return self.join(separate_orders(q, k, v, step.pairs, self.scaling))
        return self.join(self.weighted(q, k, v, step)[0])

    def weighted(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Pair:
        """Sums of the values, and of the weights."""
        kind = self.kind
        return operate(
            q,
            k,
            v,
            kind.form,
            norm=kind.norm,
            mask=step.pairs,
            scale=self.scaling,
            table=step.table,
        )

    def map(self, x: Tensor, step: Step) -> Map | None:
        q, k = self.mapped(*self.queries_keys(x, step))
        return Map(q, k, step.pairs, self.scaling, self.kind.form, step.table)

    def mapped(self, q: Tensor, k: Tensor) -> Pair:
        if self.kind.features == "elu":
            return F.elu(q) + 1, F.elu(k) + 1
        if self.kind.features == "mlp":
            return self.map_out(F.relu(self.map_in(q))), self.map_out(F.relu(self.map_in(k)))
        return q, k

    def _recurrent(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        layer, tokens = self.state(step), q.shape[2]
        live = step.new(tokens)
        old = None if layer is None or not layer.state else layer.state["sums"]
        mask = Mask.causal() if live is None else Mask.causal() & Mask.padding(live)
        out = second_order(q, k, v, mask, self.scaling, old)
        if layer is not None:
            new = summed(k, v, self.scaling, live)
            layer.put(tokens, sums=new if old is None else old + new)
        return out


class ScanMixer(Mixer):
    """One score a key, silu(q) . k at the key's own position: a cumulative weighted mean."""

    rotates = False

    def scores(self, x: Tensor, step: Step) -> Tensor:
        """One score a key, `[batch, heads, tokens]`."""
        q, k = self.queries_keys(x, step)
        k = k.repeat_interleave(self.num_key_value_groups, 1)
        return (F.silu(q).float() * k.float()).sum(-1) * self.scaling

    def map(self, x: Tensor, step: Step) -> Map | None:
        s = self.scores(x, step)[..., None]
        return Map(torch.ones_like(s), s, step.pairs, 1.0)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        s = self.scores(x, step)
        v = self.split(self.v_proj(x)).repeat_interleave(self.num_key_value_groups, 1)
        layer, tokens = self.state(step), x.shape[1]
        old = Scan(**layer.state) if layer is not None and layer.state else None
        out, new = scan(s, v, old, step.new(tokens))
        if layer is not None:
            # copies: a view would keep what it is a view of
            layer.put(tokens, **{name: part.clone() for name, part in new._asdict().items()})
        return self.join(out)


class Gated(Mixer):
    """A gated MLP with the parameters of attention: three matrices in place of those of queries,
    keys and values, and the output projection.
    """

    def _make(self, width: int, bias: bool) -> None:
        matrices = (self.heads + 2 * self.kv_heads) * self.head_dim
        inner = self.config.mlp_mixer_size
        if inner is None:
            if matrices % 3:
                raise InputError(
                    f"queries, keys and values of width {matrices} do not divide into the three "
                    "matrices of the mixer mlp: set mlp_mixer_size"
                )
            inner = matrices // 3
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        out = self.heads * self.head_dim
        self.o_proj = nn.Linear(
            width if out == width else out, width, bias=self.config.attention_bias
        )
        if out != width:
            self.down_proj = nn.Linear(inner, out, bias=bias)

    def map(self, x: Tensor, step: Step) -> Map | None:
        return None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        layer = self.state(step)
        if layer is not None:
            layer.put(x.shape[1])
        return self.o_proj(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


def at(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of `x` `[1, heads, length, dim]` at `positions` `[batch, tokens]`: `[batch, heads,
    tokens, dim]`.
    """
    return x[0][:, positions].transpose(0, 1)


def mixer(config: Any, layer_idx: int) -> Mixer:
    """The module of a layer."""
    from .graph import MIXERS  # which builds on this module

    modules: dict[str, type[Mixer]] = {
        "attention": Attention,
        "operation": Operation,
        "scan": ScanMixer,
        "mlp": Gated,
        **MIXERS,
    }
    return modules[KINDS[config.mixers[layer_idx]].module](config, layer_idx)
