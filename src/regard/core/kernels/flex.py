"""FlexAttention: any mask, soft cap or bias in one fused call that returns its lse; compiled on
GPUs, where it brings its own gradients.

On a CPU the eager form builds the whole score matrix, so `attend` never chooses it there; the
tests do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..mask import Mask
from .inputs import Inputs


def why_not(inputs: Inputs) -> str | None:
    """Why FlexAttention does not compute this: sizes, and dtypes of the compiled kernel."""
    q, k, v = inputs[:3]
    if min(q.shape[2], k.shape[2]) == 0:
        return "there is nothing to attend from or to"
    if q.device.type == "cpu":
        return None
    if q.dtype == torch.float64:
        return "compiled, it takes no float64"
    if min(q.shape[-1], v.shape[-1]) < 16:
        return "compiled, its heads are at least 16 wide"
    return None


def has_gradients(q: Tensor, bias: Tensor | None) -> bool:
    """Whether gradients are FlexAttention's own: on GPUs, all but those of a bias."""
    return q.device.type == "cuda" and (bias is None or not bias.requires_grad)


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
    from torch.nn.attention.flex_attention import AuxRequest

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

    if not has_gradients(q, bias):  # they are the caller's
        q, k, v = (t.detach() for t in (q, k, v))
        bias = None if bias is None else bias.detach()
    with many_graphs(), _compiling(q.device.type):
        out, aux = _call(q.device.type)(
            q,
            k,
            v,
            score_mod=change if softcap is not None or bias is not None else None,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out, aux.lse


def _compiling(device: str) -> Any:
    """Compile this kernel even where compiled models are left alone; eager it is a whole matrix."""
    stance = torch._dynamo.eval_frame._stance.stance
    return (
        torch.compiler.set_stance() if device == "cuda" and stance != "default" else nullcontext()
    )


@lru_cache
def _call(device: str) -> Any:
    return torch.compile(_attention, dynamic=True) if device == "cuda" else _attention


def _attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    """A function of our own: graphs are counted by function, and those of another user's
    `torch.compile(flex_attention)` are not to end at his limit because of ours.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, **settings)


@contextmanager
def many_graphs() -> Iterator[None]:
    """More graphs of one function than torch allows by default (past its limit FlexAttention builds
    whole score matrices without a word), and ones whose backward can run twice.
    """
    from torch._dynamo import config as graphs
    from torch._functorch import config as gradients

    with graphs.patch(recompile_limit=256), gradients.patch(donated_buffer=False):
        yield
