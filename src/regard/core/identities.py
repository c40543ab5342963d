"""Facts as calls of `attend`: exact, differentiable, and on whatever kernel `attend` chooses.

All take `q` `[batch, heads, queries, head_dim]`, `k` `[batch, kv_heads, keys, head_dim]` and the
`lse` `[batch, heads, queries]` of the same call. Scores with a soft cap or a bias have no such
identities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import attend
from .mask import Mask
from .state import mass as _share


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Attention each key receives, sum_i w_i P_ij: float32 `[batch, heads, keys]`.

    Args:
        q: `[batch, heads, queries, head_dim]`; k: `[batch, kv_heads, keys, head_dim]`.
        lse: `[batch, heads, queries]` of the same call, from `attend(...).lse`.
        weights: per-query weights w `[batch, heads, queries]` (or broadcast), of any sign; 1 when
            None.

    With gradients the roles are swapped: keys attend to queries with -lse as one more feature of
    the query, and the exponentiated lse of that call is the answer; its gradient needs no matrix
    either.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if weights is not None:
        weights = weights.to(lse.dtype).expand(lse.shape)
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    work = lse.dtype
    bias = -lse.masked_fill(lse == -torch.inf, 1e30) / scale
    new_k = torch.cat([q.to(work), bias[..., None].to(work)], -1)
    wide = k.to(work).repeat_interleave(heads // k.shape[1], 1)
    new_q = torch.cat([wide, wide.new_ones(*wide.shape[:3], 1)], -1)
    values = torch.ones_like(lse)[..., None] if weights is None else weights[..., None]
    swapped = None if mask is None else mask.swap(queries, keys)
    state = attend(new_q, new_k, values, mask=swapped, scale=scale)
    total = state.lse.exp()
    return total if weights is None else total * state.out[..., 0]


def entropy(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """Entropy of each query's attention in nats: float32 `[batch, heads, queries]`; 0 where a
    query sees no key.

    The identity is lse - scale * q . E[k], with E[k] the attention output when the values are the
    keys, times what of the query's attention lies on keys: less than 1 beside a learned sink.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.to(lse.dtype), k.to(lse.dtype)
    keys = attend(q, k, k, mask=mask, scale=scale)
    share = _share(keys, lse)
    return share * (lse.masked_fill(lse == -torch.inf, 0.0) - scale * (q * keys.out).sum(-1))


def distance(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """Expected distance |i - j| in tokens: float32 `[batch, heads, queries]`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.to(lse.dtype), k.to(lse.dtype)
    j = torch.arange(k.shape[2], device=k.device, dtype=lse.dtype)
    i = torch.arange(q.shape[2], device=k.device, dtype=lse.dtype) + k.shape[2] - q.shape[2]
    values = j[:, None].expand(*k.shape[:3], 1)
    total = torch.zeros_like(lse)
    keys_behind, keys_ahead = Mask.band(None, 0), Mask.band(-1, None)
    for side, sign in ((keys_behind, 1), (keys_ahead, -1)):
        part = attend(q, k, values, mask=side if mask is None else mask & side, scale=scale)
        total = total + sign * _share(part, lse) * (i - part.out[..., 0])
    return total


def mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """Share of each query's attention per key segment: `[batch, heads, queries, count]`.

    `segments` holds an id from 0 for every key, `[keys]` or `[batch, keys]`; -1 belongs to none.
    """
    ids = torch.atleast_2d(segments).expand(k.shape[0], -1)
    count = int(ids.max()) + 1
    member = torch.nn.functional.one_hot(ids.clamp_min(0), count) * (ids >= 0)[..., None]
    values = member[:, None].to(lse.dtype).expand(-1, k.shape[1], -1, -1)
    members = attend(q.to(lse.dtype), k.to(lse.dtype), values, mask=mask, scale=scale)
    return _share(members, lse)[..., None] * members.out


def collision(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """sum_j P_ij^2, by exp(lse at twice the scale - 2 lse): float32 `[batch, heads, queries]`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    twice = attend(
        q.to(lse.dtype), k.to(lse.dtype), k.to(lse.dtype), mask=mask, scale=2 * scale
    ).lse
    seen = lse != -torch.inf
    return torch.where(seen, (twice - 2 * torch.where(seen, lse, 0.0)).exp(), 0.0)
