"""Torch's fused CPU attention, which returns its lse; for plain causal and full attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask import Mask


def supports(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, softcap: float | None, bias: Tensor | None
) -> bool:
    """Whether one fused call (one a batch row with grouped heads) computes this exactly."""
    if (
        q.device.type != "cpu"
        or softcap is not None
        or bias is not None
        or q.dtype == torch.float16
    ):
        return False
    if q.shape[-1] != v.shape[-1] or 0 in q.shape or k.shape[2] == 0:
        return False
    size = (q.shape[2], k.shape[2])
    return mask is None or mask.is_causal(*size) or mask.is_full(*size)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; grouped keys are read in place through a zero stride, never copied."""
    batch, heads, queries, dim = q.shape
    causal = mask is not None and queries > 1 and mask.is_causal(queries, k.shape[2])
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if heads == k.shape[1]:
        return _flash(q, k, v, causal, scale)
    groups = (k.shape[1], heads // k.shape[1])
    if queries == 1:  # one query a head: a group is just more queries of the same keys
        out, lse = _flash(q.reshape(batch, *groups, dim), k, v, False, scale)
        return out.reshape(q.shape), lse.reshape(batch, heads, 1)
    out = q.new_empty(q.shape)
    lse = q.new_empty(
        q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    for b in range(
        batch
    ):  # the kernel's batch axis holds the key heads, its head axis their queries
        wide = [t[b, :, None].expand(groups[0], groups[1], *t.shape[2:]) for t in (k, v)]
        o, e = _flash(q[b].unflatten(0, groups), wide[0], wide[1], causal, scale)
        out[b], lse[b] = o.flatten(0, 1), e.flatten(0, 1)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = fused(q, k, v, 0.0, causal, scale=scale)
    return out, lse
