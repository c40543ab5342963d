"""Adjacency: how attention weights become the edges of a graph, row by row, never as a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import Mask
from regard.core.kernels.tiled import MASKED, Size, Tiles
from regard.core.precision import as_given

from .operations import Form

SHARP = 10.0
SHARE = 0.1  # of the keys that a row of "top_k" keeps
Edge = Callable[[Tensor, float], Tensor]

EDGES: dict[str, Edge] = {
    "relu": lambda p, t: F.relu(p - t),
    "silu": lambda p, t: F.silu(p - t),
    "softplus": lambda p, t: F.softplus(p - t),
    "sharp_softplus": lambda p, t: F.softplus(SHARP * (p - t)) / SHARP,
    "sigmoid": lambda p, t: torch.sigmoid(SHARP * (p - t)),
    "flow": lambda p, t: torch.sigmoid(5 * p) * torch.sigmoid(50 * (p - t)),
    "binary": lambda p, t: (p > t).to(p.dtype),
    "silu_plus_binary": lambda p, t: F.silu(p - t) + (p > t).to(p.dtype),
    "silu_below": lambda p, t: torch.where(p > t, 1.0, F.silu(p - t)),
    "relu_below": lambda p, t: torch.where(p > t, 1.0, F.relu(p - t)),
    "softplus_below": lambda p, t: torch.where(p > t, 1.0, F.softplus(p - t)),
}
"""Weight of an edge by the attention weight and a threshold."""

TOP = ("top_k", "causal_top_k")
"""Edges of weight 1 to the largest attention weights of a row: a tenth of the keys it sees, itself
included, one at least; or a tenth of those before it, rounded up.
"""

ADJACENCIES = ("none", *EDGES, *TOP)

POSITIVE = ("relu", "silu", "binary", "silu_plus_binary", "silu_below", "relu_below")
"""Where an edge is above 0 exactly where the attention weight is above the threshold."""


def form_of(name: str, threshold: float) -> Form:
    """The weight of an edge as a function of the log of the attention weight."""
    edge = EDGES[name]

    def slope(z: Tensor) -> Tensor:
        p = z.detach().exp()
        with torch.enable_grad():
            p.requires_grad_()
            weights = edge(p, threshold)
            if not weights.requires_grad:
                return torch.zeros_like(z)
            (grad,) = torch.autograd.grad(weights.sum(), p)
        return grad * p.detach()

    return Form(lambda z: edge(z.exp(), threshold), slope)


ABOVE = Form(lambda z: (z >= 0).to(z.dtype), torch.zeros_like)
"""1 for scores that reach what was taken off."""


@torch.no_grad()
def cuts(q: Tensor, k: Tensor, mask: Mask, scale: float, name: str) -> tuple[Tensor, Mask]:
    """The least score that a row of "top_k" or "causal_top_k" keeps, `[batch, heads, queries]`, inf
    where it keeps none; and the mask of the pairs among which it chooses.
    """
    if name == "causal_top_k":
        mask = mask & Mask.band(None, -1)
    with as_given(q):
        tiles = Tiles(q, k, mask, scale, size=Size(64, 256, 64, 2**22))
        least = tiles.q.new_full(tiles.q.shape[:-1], torch.inf)
        for b, h, rows, row in tiles.blocks():
            best: Tensor | None = None
            seen: Any = 0.0
            for tile in row:
                s = tile.scores
                many = torch.ones_like(s) if tile.allowed is None else tile.allowed.expand_as(s)
                seen = seen + many.sum(-1)
                both = s if best is None else torch.cat([best, s], -1)
                most = max(1, -(-k.shape[2] // 10))
                best = both.topk(min(most, both.shape[-1]), -1).values
            if best is None:
                continue
            wanted = (seen * SHARE).ceil() if name == "causal_top_k" else (seen * SHARE).floor()
            wanted = wanted.clamp_min(0 if name == "causal_top_k" else 1).long()
            at = (wanted - 1).clamp(0, best.shape[-1] - 1)
            chosen = best.gather(-1, at[..., None])[..., 0]
            chosen = torch.where(wanted > 0, chosen, torch.inf)
            least[b, h, :, rows] = torch.where(chosen <= MASKED / 2, torch.inf, chosen)
    return least.flatten(1, 2), mask


def largest(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, lse: Tensor, least: float
) -> Tensor:
    """Element-wise maximum of `v` over the keys whose score less the lse is above (of "top_k": at
    least) `least`; a query without one gets its own. `[batch, heads, queries, value_dim]`, with
    gradients to `v`.
    """
    groups = q.shape[1] // k.shape[1]
    with torch.no_grad(), as_given(q):
        tiles = Tiles(q, k, mask, scale, lse=lse, size=Size(32, 32, 32, 2**18))
        flat = v.to(tiles.work)
        shape = (*tiles.q.shape[:-1], v.shape[-1])
        most = flat.new_full(shape, -torch.inf)
        where = (torch.arange(q.shape[2], device=q.device) + k.shape[2] - q.shape[2])[:, None]
        where = where.expand(shape).clone()
        for tile in tiles:
            b, h, rows, cols = tile.batch, tile.heads, tile.rows, tile.cols
            edge = tile.scores > least
            if tile.allowed is not None:
                edge = edge & (tile.allowed > 0)
            values = flat[b, h, None, None, cols].expand(*edge.shape, -1)
            top = values.masked_fill(~edge[..., None], -torch.inf).max(-2)
            better = top.values > most[b, h, :, rows]
            most[b, h, :, rows] = torch.where(better, top.values, most[b, h, :, rows])
            index = top.indices + cols.start
            where[b, h, :, rows] = torch.where(better, index, where[b, h, :, rows])
    wide = v.repeat_interleave(groups, 1)
    return wide.gather(2, where.flatten(1, 2))
