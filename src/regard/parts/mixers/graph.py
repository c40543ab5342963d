"""Mixers that read attention as a graph: GIN, PNA, and the difference of two attentions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from regard.core import attend

from .adjacency import ABOVE, POSITIVE, TOP, cuts, form_of, largest
from .layers import Mixer, Step
from .look import Map
from .operations import operate


class HeadMLP(nn.Module):
    """An MLP of its own for every head: linear, dropout, RMS norm, SiLU, linear."""

    def __init__(self, heads: int, width: int, inner: int, out: int, dropout: float) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(heads, width, inner))
        self.bias_in = nn.Parameter(torch.empty(heads, 1, inner))
        self.norm = nn.Parameter(torch.empty(heads, 1, inner))
        self.weight_out = nn.Parameter(torch.empty(heads, inner, out))
        self.bias_out = nn.Parameter(torch.empty(heads, 1, out))
        self.dropout = nn.Dropout(dropout)

    def start(self, init: Any, std: float) -> None:
        """First weights."""
        for weight in (self.weight_in, self.weight_out):
            init.normal_(weight, 0.0, std)
        for bias in (self.bias_in, self.bias_out):
            init.zeros_(bias)
        init.ones_(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, heads, tokens, width]` to `[batch, heads, tokens, out]`."""
        x = self.dropout(x @ self.weight_in + self.bias_in)
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return F.silu(x * self.norm) @ self.weight_out + self.bias_out


class Graph(Mixer):
    """Queries and keys whose attention weights, through an adjacency, are the edges of a graph."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sharp = nn.Parameter(torch.empty(()))

    def start(self, init: Any, std: float) -> None:
        """First weights."""
        init.ones_(self.sharp)

    def edges(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        q, k = self.queries_keys(x, step)
        return q * self.sharp, k

    def map(self, x: Tensor, step: Step) -> Map | None:
        q, k = self.edges(x, step)
        return Map(q, k, step.pairs, self.scaling, table=step.table)

    def thresholded(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Sums over the edges of an adjacency, and the sum of their weights."""
        name, scale = self.config.graph_adjacency, self.scaling
        if name in TOP:
            cut, mask = cuts(q.detach(), k.detach(), step.pairs, scale, name)
            return operate(q, k, v, ABOVE, mask=mask, scale=scale, lse=cut)
        lse = self.lse(q, k, step)
        form = form_of(name, self.config.graph_threshold)
        return operate(q, k, v, form, mask=step.pairs, scale=scale, lse=lse, table=step.table)

    def lse(self, q: Tensor, k: Tensor, step: Step) -> Tensor:
        bias = None
        if step.table is not None:
            from .operations import Distances

            bias = Distances(step.table, q.shape[2], k.shape[2]).dense()
        state = attend(q, k, k[..., :1], mask=step.pairs, scale=self.scaling, bias=bias)
        return state.lse


class Gin(Graph):
    """`MLP_h(eps_h X_h + A_h X_h)`: attention sums hidden states, without values and without an
    output projection; an MLP a head follows.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        inner = config.graph_inner
        self.eps = nn.Parameter(torch.empty(self.heads, 1, 1))
        self.heads_mlp = HeadMLP(
            self.heads, self.head_dim, inner, self.head_dim, config.graph_dropout
        )

    def _make(self, width: int, bias: bool) -> None:
        size = self.heads * self.head_dim
        self.q_proj = nn.Linear(width, size, bias=bias)
        self.k_proj = nn.Linear(width, size, bias=bias)
        if self.config.graph_output:
            self.o_proj = nn.Linear(size, width, bias=self.config.attention_bias)

    def start(self, init: Any, std: float) -> None:
        super().start(init, std)
        init.zeros_(self.eps)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k = self.edges(x, step)
        own = self.split(x)
        k, v = self.remember(k, own, step)
        if self.config.graph_adjacency == "none":
            function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            drop = self.config.attention_dropout if self.training else 0.0
            out, _ = function(self, q, k, v, step.mask, dropout=drop, scaling=self.scaling)
            sums = out.transpose(1, 2)
        else:
            sums, _ = self.thresholded(q, k, v, step)
        eps = self.eps if self.config.graph_self == "eps" else 1 + self.eps
        mixed = self.heads_mlp(eps * own + sums).transpose(1, 2).flatten(2)
        return self.o_proj(mixed) if self.config.graph_output else mixed


class Pna(Graph):
    """`MLP_h([sum; mean; max; var])` of the values over the edges, then the output projection.

    Under softmax the weights of a row are 1 together, so that sum and mean are equal; the maximum
    is over every key with an edge above 0, unweighted.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        inner = config.graph_inner
        self.heads_mlp = HeadMLP(
            self.heads, 4 * self.head_dim, inner, self.head_dim, config.graph_dropout
        )

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k = self.edges(x, step)
        k, v = self.remember(k, self.split(self.v_proj(x)), step)
        both = torch.cat([v, v * v], -1)
        if self.config.graph_adjacency == "none":
            function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            drop = self.config.attention_dropout if self.training else 0.0
            out, _ = function(self, q, k, both, step.mask, dropout=drop, scaling=self.scaling)
            sums, squares = out.transpose(1, 2).chunk(2, -1)
            mean, square = sums, squares
        else:
            out, degree = self.thresholded(q, k, both, step)
            sums, squares = out.chunk(2, -1)
            degree = torch.where(degree == 0, 1.0, degree)[..., None].to(sums.dtype)
            mean, square = sums / degree, squares / degree
        var = (square - mean * mean).clamp_min(0)
        most = self._largest(q, k, v, step)
        return self.join(self.heads_mlp(torch.cat([sums, mean, most, var], -1)))

    def _largest(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        name, queries = self.config.graph_adjacency, q.shape[2]
        if name in TOP:
            cut, mask = cuts(q.detach(), k.detach(), step.pairs, self.scaling, name)
            return largest(q, k, v, mask, self.scaling, cut, -1e-30)
        if name in POSITIVE:
            least = math.log(self.config.graph_threshold)
            return largest(q, k, v, step.pairs, self.scaling, self.lse(q, k, step), least)
        own = v[:, :, -queries:]
        seen = v if step.live is None else v.masked_fill(~step.live[:, None, :, None], -torch.inf)
        most = seen.cummax(2).values[:, :, -queries:]
        most = torch.where(most == -torch.inf, own, most)
        return most.repeat_interleave(self.num_key_value_groups, 1)


class Differential(Mixer):
    """The difference of two softmax attentions, `A_1 - lambda A_2`, over the same values."""

    def _make(self, width: int, bias: bool) -> None:
        super()._make(width, bias)
        size, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, 2 * size, bias=bias)
        self.k_proj = nn.Linear(width, 2 * shared, bias=bias)
        self.weight = nn.Parameter(torch.empty(()))
        self.first = 0.8 - 0.6 * math.exp(-0.3 * self.layer_idx)
        if self.config.differential_norm:
            self.scale = nn.Parameter(torch.empty(self.head_dim))

    def start(self, init: Any, std: float) -> None:
        """First weights."""
        init.constant_(self.weight, self.first)
        if self.config.differential_norm:
            init.ones_(self.scale)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k = self.queries_keys(x, step)
        k, v = self.remember(k, self.split(self.v_proj(x)), step)
        mask = step.mask
        if torch.is_tensor(mask) and mask.dim() == 4 and mask.shape[1] > 1:
            mask = torch.cat([mask, mask], 1)
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        drop = self.config.attention_dropout if self.training else 0.0
        out, _ = function(
            self, q, k, torch.cat([v, v], 1), mask, dropout=drop, scaling=self.scaling
        )
        one, two = out.transpose(1, 2).chunk(2, 1)
        mixed = one - self.weight * two
        if self.config.differential_norm:
            wide = mixed.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
            mixed = wide.to(mixed.dtype) * self.scale * (1 - self.first)
        return self.join(mixed)

    def map(self, x: Tensor, step: Step) -> Map | None:
        q, k = self.queries_keys(x, step)
        table = None if step.table is None else torch.cat([step.table, step.table])
        return Map(q, k, step.pairs, self.scaling, table=table)


MIXERS: dict[str, type[Mixer]] = {"gin": Gin, "pna": Pna, "differential": Differential}
