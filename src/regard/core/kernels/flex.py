"""FlexAttention: any mask, soft cap or bias in one fused call that returns its lse; compiled on
GPUs.

On a CPU the eager form builds the whole score matrix, so `attend` never chooses it there; the
tests do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..mask import Mask


def supports(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, softcap: float | None, bias: Tensor | None
) -> bool:
    """Head sizes and dtypes that the compiled kernel takes."""
    return q.dtype != torch.float64 and q.shape[-1] >= 16 and v.shape[-1] >= 16


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of one FlexAttention call."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    queries, keys = q.shape[2], k.shape[2]
    block_mask = (
        None
        if mask is None or mask.is_full(queries, keys)
        else mask.block_mask(queries, keys, q.device)
    )

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, i, j]
        return score

    call = _compiled() if q.device.type == "cuda" else flex_attention
    out, aux = call(
        q.detach(),  # gradients are the caller's
        k.detach(),
        v.detach(),
        score_mod=change if softcap is not None or bias is not None else None,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse
