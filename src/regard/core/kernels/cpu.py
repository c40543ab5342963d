"""Torch's fused CPU attention, which returns its lse; for plain causal and full attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask import Mask
from . import tiled
from .inputs import Inputs


def why_not(inputs: Inputs) -> str | None:
    """Why one fused call (one a batch row with grouped heads) does not compute this exactly."""
    reason = not_fused(inputs)
    if reason is not None:
        return reason
    mask, size = inputs.mask, (inputs.q.shape[2], inputs.k.shape[2])
    if mask is None or mask.is_causal(*size) or mask.is_full(*size):
        return None
    return "it knows plain causal and full attention, no other mask"


def not_fused(inputs: Inputs) -> str | None:
    """Why torch's fused CPU kernel does not take such tensors, whatever the mask."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.device.type != "cpu":
        return f"it takes CPU tensors, not {q.device.type}"
    if inputs.softcap is not None:
        return "it computes no soft cap"
    if inputs.bias is not None:
        return "it adds no bias"
    if q.dtype == torch.float16:
        return "it takes no float16"
    if q.shape[-1] != v.shape[-1]:
        return f"its values are as wide as its keys, not {v.shape[-1]} and {q.shape[-1]}"
    if 0 in q.shape or k.shape[2] == 0:
        return "there is nothing to attend from or to"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: None = None,
    bias: None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; grouped keys are read in place through a zero stride, never copied.

    A call in which the fused kernel may have lost a NaN goes by tiles.
    """
    out, lse = _fused(q, k, v, mask, scale)
    return (out, lse) if sound(lse) else tiled.forward(q, k, v, mask, scale)


def sound(lse: Tensor) -> bool:
    """Whether no score was NaN, by the lse of the fused kernel: it gives an out and an lse of 0
    where all scores of its last few keys are NaN.
    """
    return bool((lse.isfinite() & (lse != 0)).all())


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float
) -> tuple[Tensor, Tensor]:
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
    for b in range(batch):
        # the kernel's batch axis holds the key heads, its head axis their queries
        wide = [t[b, :, None].expand(groups[0], groups[1], *t.shape[2:]) for t in (k, v)]
        o, e = _flash(q[b].unflatten(0, groups), wide[0], wide[1], causal, scale)
        out[b], lse[b] = o.flatten(0, 1), e.flatten(0, 1)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = fused(q, k, v, 0.0, causal, scale=scale)
    return out, lse
