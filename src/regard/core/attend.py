"""attend: the only place that chooses a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

from .kernels import Inputs, Kernel, pick, tiled
from .kernels.inputs import scale_of
from .mask import Mask
from .precision import as_given
from .state import State, merge


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
            queries), and the keys of a group are not copied.
        v: values `[batch, kv_heads, keys, value_dim]`.
        mask: who sees whom; None lets every query see every key. A query that sees none gives out
            0, lse -inf.
        scale: factor on the scores, `head_dim ** -0.5` by default.
        softcap: scores become `softcap * tanh(score / softcap)` before mask and softmax (Gemma 2).
        bias: additive scores `[batch or 1, heads or 1, queries, keys]` (T5); a matrix that exists
            already.
        sinks: learned sink logit of each head, `[heads]` (gpt-oss), or of each query too, `[batch,
            heads, queries]`: one more key with value 0.
        kernel: one of `regard.core.KERNELS` by name; the first that can compute this call on this
            device when None.

    Raises:
        InputError: inputs that do not fit, or a kernel that cannot compute this call.

    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> whole = attend(q, k, v)
    >>> parts = merge(attend(q, k[:, :, :2], v[:, :, :2]), attend(q, k[:, :, 2:], v[:, :, 2:]))
    >>> torch.allclose(whole.out, parts.out, atol=1e-6)
    True
    """
    inputs = Inputs(q, k, v, mask, scale_of(q, scale), softcap, bias)
    inputs.check()
    if sinks is not None and getattr(sinks, "shape", None) not in (q.shape[1:2], q.shape[:3]):
        shape = tuple(getattr(sinks, "shape", ()))
        raise InputError(f"sinks {shape} are not [{q.shape[1]}], one a head, nor one a query")
    chosen = pick(inputs, kernel)
    with as_given(q):
        if chosen.differentiable(inputs):
            out, lse = chosen.forward(*inputs)
        else:
            out, lse = _Attend.apply(*inputs, chosen)
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
    return pick(Inputs(q, k, v, mask, 1.0, softcap, bias)).name


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
        mask: Mask | None,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
        kernel: Kernel,
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernel.forward(q, k, v, mask, scale, softcap, bias)
        out = out.to(q.dtype)
        lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.settings = (mask, scale, softcap, kernel)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        mask, scale, softcap, kernel = ctx.settings
        with as_given(q):
            if kernel.backward is not None and grad_out is not None and grad_lse is None:
                inputs = (q, k, v, mask, scale, softcap, bias)
                return (*kernel.backward(grad_out, *inputs), *5 * (None,))
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
            settings = (mask, scale, softcap, bias)
            grads = tiled.backward(grad_out, grad_lse, q, k, v, out, lse, *settings)
        # in the order of forward: q, k, v, mask, scale, softcap, bias, kernel
        return (*grads[:3], None, None, None, grads[3], None)
