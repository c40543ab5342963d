"""attend: the only place that chooses a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels import cpu, cuda, flex, reference, spans, tiled
from .mask import Mask
from .precision import as_given
from .state import State, merge

KERNELS = ("cpu", "spans", "cuda", "flex", "tiled", "reference")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    kernel: str | None = None,
) -> State:
    """Softmax attention of every query, with its log-sum-exp; exact, differentiable in out and lse.

    Args:
        q: queries `[batch, heads, queries, head_dim]`.
        k: keys `[batch, kv_heads, keys, head_dim]`; `heads` is a multiple of `kv_heads` (grouped
            queries),
            and the keys of a group are not copied.
        v: values `[batch, kv_heads, keys, value_dim]`.
        mask: who sees whom; None lets every query see every key. A query that sees none gives out
            0, lse -inf.
        scale: factor on the scores, `head_dim ** -0.5` by default.
        softcap: scores become `softcap * tanh(score / softcap)` before mask and softmax (Gemma 2).
        bias: additive scores `[batch or 1, heads or 1, queries, keys]` (T5); a matrix that exists
            already.
        sinks: learned sink logit of each head, `[heads]` (gpt-oss), or of each query too, `[batch,
            heads, queries]`: one more key with value 0.
        kernel: one of `KERNELS` by name; chosen by device, mask and shape when None.

    Raises:
        ValueError: shapes that do not fit, or a kernel that cannot compute this call.

    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> whole = attend(q, k, v)
    >>> parts = merge(attend(q, k[:, :, :2], v[:, :, :2]), attend(q, k[:, :, 2:], v[:, :, 2:]))
    >>> torch.allclose(whole.out, parts.out, atol=1e-6)
    True
    """
    _check(q, k, v, mask, bias, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    name = kernel or choose(q, k, v, mask=mask, softcap=softcap, bias=bias)
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(KERNELS)}")
    with as_given(q):
        if name == "flex" and flex.has_gradients(q, bias):
            out, lse = flex.forward(q, k, v, mask, scale, softcap, bias)
        else:
            out, lse = _Attend.apply(q, k, v, bias, mask, scale, softcap, name)
    state = State(out, lse)
    if sinks is not None:
        learned = (sinks if sinks.dim() == 3 else sinks[None, :, None]).to(lse.dtype)
        learned = learned.expand(lse.shape)
        state = merge(state, State(torch.zeros_like(out), learned))
    return state


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> str:
    """Name of the kernel that `attend` takes for such a call."""
    if cpu.supports(q, k, v, mask, softcap, bias):
        return "cpu"
    if spans.supports(q, k, v, mask, softcap, bias):
        return "spans"
    if cuda.supports(q, k, v, mask, softcap, bias):
        return "cuda"
    if q.device.type == "cuda" and flex.supports(q, k, v, mask, softcap, bias):
        return "flex"
    return "tiled"


class _Attend(torch.autograd.Function):
    """A kernel forward that has no gradients of its own; backward recomputes tiles, so that out and
    lse both carry them, or on a GPU torch's own attention, where lse has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Mask | None,
        scale: float,
        softcap: float | None,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        if name == "cpu":
            if not cpu.supports(q, k, v, mask, softcap, bias):
                raise ValueError(
                    "kernel 'cpu' computes plain causal or full attention of CPU tensors only: "
                    "use 'tiled'"
                )
            out, lse = cpu.forward(q, k, v, mask, scale)
        elif name == "spans":
            if not spans.supports(q, k, v, mask, softcap, bias):
                raise ValueError(
                    "kernel 'spans' takes CPU tensors, some queries and neither soft cap nor bias: "
                    "use 'tiled'"
                )
            out, lse = spans.forward(q, k, v, mask, scale)
        elif name == "cuda":
            out, lse = cuda.forward(q, k, v, mask, scale)
        elif name == "flex":
            out, lse = flex.forward(q, k, v, mask, scale, softcap, bias)
        elif name == "reference":
            out, lse = reference.attend(q, k, v, mask, scale, softcap, bias)
        else:
            out, lse = tiled.forward(q, k, v, mask, scale, softcap, bias)
        out = out.to(q.dtype)
        lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.settings = (mask, scale, softcap, name)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        mask, scale, softcap, name = ctx.settings
        with as_given(q):
            if name == "cuda" and grad_out is not None and grad_lse is None:
                return (*cuda.backward(grad_out, q, k, v, mask, scale), *5 * (None,))
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
            settings = (mask, scale, softcap, bias)
            grads = tiled.backward(grad_out, grad_lse, q, k, v, out, lse, *settings)
        return (*grads, None, None, None, None)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError("q, k and v are [batch, heads, tokens, head_dim]")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if bias is not None and (bias.dim() != 4 or bias.shape[2:] != (q.shape[2], k.shape[2])):
        raise ValueError(
            f"bias {tuple(bias.shape)} is not [batch, heads, {q.shape[2]}, {k.shape[2]}]"
        )
    if sinks is not None and sinks.shape not in (q.shape[1:2], q.shape[:3]):
        raise ValueError(
            f"sinks {tuple(sinks.shape)} are not [{q.shape[1]}], one a head, or one a query"
        )
    for name, rows, heads in (
        ("bias", *((1, 1) if bias is None else bias.shape[:2])),
        ("mask", *((1, 1) if mask is None else (mask.batch, mask.heads))),
    ):
        if rows not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
            raise ValueError(
                f"a {name} of {rows} batch rows and {heads} heads does not fit {q.shape[0]} rows "
                f"and {q.shape[1]} heads: give it 1 of either, or all"
            )
