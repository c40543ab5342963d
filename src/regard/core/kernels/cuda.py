"""Torch's fused CUDA attention, whose operators return their lse; for plain causal and full
attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..mask import Mask
from .inputs import Inputs


def why_not(inputs: Inputs) -> str | None:
    """Why one fused call does not compute this exactly."""
    q, k, v, mask = inputs[:4]
    if q.device.type != "cuda":
        return f"it takes CUDA tensors, not {q.device.type}"
    if inputs.softcap is not None:
        return "it computes no soft cap"
    if inputs.bias is not None:
        return "it adds no bias"
    if q.dtype == torch.float64:
        return "it takes no float64"
    if q.shape[-1] % 8 or v.shape[-1] % 8:
        return f"its heads are a multiple of 8 wide, not {q.shape[-1]} and {v.shape[-1]}"
    size = (q.shape[2], k.shape[2])
    if mask is None or mask.is_causal(*size) or mask.is_full(*size):
        return None
    return "it knows plain causal and full attention, no other mask"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: None = None,
    bias: None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: cuDNN where torch's own attention takes it, else FlashAttention for half
    precision and the memory-efficient kernel for float32.

    cuDNN reads grouped keys in place, the others get them repeated.
    """
    queries = q.shape[2]
    causal = _is_causal(q, k, mask)
    if _choice(q, k, v, causal, scale) == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )[:2]
        return out, lse.squeeze(-1)
    if q.shape[1] != k.shape[1]:  # these operators want as many key heads as query heads
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= 256:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )[:2]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = efficient(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., :queries]  # the efficient kernel rounds its rows up


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: None = None,
    bias: None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v by the backward of torch's own attention, computed once more."""
    queries, keys, values = given = [t.detach().requires_grad_() for t in (q, k, v)]
    causal, grouped = _is_causal(q, k, mask), q.shape[1] != k.shape[1]
    with torch.enable_grad():
        if grouped and _choice(q, k, v, causal, scale) == SDPBackend.MATH.value:
            # nothing fused reads grouped keys in place here, and the rest builds the matrix
            keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in given[1:])
            grouped = False
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return torch.autograd.grad(out, given, grad_out)


def _is_causal(q: Tensor, k: Tensor, mask: Mask | None) -> bool:
    return mask is not None and q.shape[2] > 1 and mask.is_causal(q.shape[2], k.shape[2])


def _choice(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> int:
    """The backend that torch's scaled_dot_product_attention picks for this call, by its number."""
    return int(torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=True))
