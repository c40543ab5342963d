"""The truth every fast path is held against: dense, float64, one line a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask import Mask


def scores(
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scores before the softmax, -inf where masked: float64 `[batch, heads, queries, keys]`."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    if mask is not None:
        s = s.masked_fill(~mask.cells(q.shape[2], k.shape[2], device=q.device), -torch.inf)
    return s


def probabilities(
    q: Tensor,
    k: Tensor,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The attention matrix itself, float64 `[batch, heads, queries, keys]`; a row that sees
    nothing is 0.
    """
    s = scores(q, k, mask, q.shape[-1] ** -0.5 if scale is None else scale, softcap, bias)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention through the whole matrix in float64: needs queries x keys memory, for tests and
    short inputs.
    """
    p = probabilities(q, k, mask, scale, softcap, bias)
    lse = torch.logsumexp(scores(q, k, mask, scale, softcap, bias), -1)
    return p @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1), lse
