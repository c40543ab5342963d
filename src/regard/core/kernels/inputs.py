"""What one attention call is computed from."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from regard.errors import InputError

from ..mask import Mask


class Inputs(NamedTuple):
    """The arguments of every kernel, in this order.

    `q` is `[batch, heads, queries, head_dim]`; `k`, `v` are `[batch, kv_heads, keys, dim]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None = None
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            InputError: shapes, a mask or numbers that no kernel could compute.
        """
        q, k, v, mask, scale, softcap, bias = self
        for name, given in zip(self._fields, self):
            _typed(name, given)
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            raise InputError("q, k and v are [batch, heads, tokens, head_dim]")
        if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
            raise InputError(
                f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
        heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
        if heads % k.shape[1]:
            raise InputError(f"{heads} query heads are not a multiple of {k.shape[1]} key heads")
        if not math.isfinite(scale):
            raise InputError(f"scale is a finite number, not {scale}")
        if softcap is not None and not 0 < softcap < math.inf:
            raise InputError(f"softcap is a finite number above 0, not {softcap}: None for no cap")
        if bias is not None:
            if bias.dim() != 4 or bias.shape[2:] != (queries, keys):
                raise InputError(
                    f"bias {tuple(bias.shape)} is not [batch, heads, {queries}, {keys}]"
                )
            if not bias.is_floating_point():
                raise InputError(
                    f"a bias is added to the scores and floating point, not {bias.dtype}: give "
                    "which pairs are allowed as mask=Mask.dense(...)"
                )
            _fits("bias", bias.shape[0], bias.shape[1], q)
        if mask is None:
            return
        if not isinstance(mask, Mask):
            raise InputError(
                f"mask is a regard.core.Mask, not {_shown(mask)}: Mask.causal(), "
                "Mask.padding(attention_mask), Mask.dense(boolean_matrix), ..."
            )
        reason = mask.misfit(queries, keys)
        if reason is not None:
            raise InputError(f"the mask does not fit {queries} queries and {keys} keys: {reason}")
        _fits("mask", mask.batch, mask.heads, q)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor on the scores, `head_dim ** -0.5` where none is given."""
    _typed("scale", scale)
    _typed("q", q)
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _typed(name: str, given: object) -> None:
    """Refuse arguments of another kind."""
    if name in ("q", "k", "v") or (name == "bias" and given is not None):
        if not isinstance(given, Tensor) or (name != "bias" and not given.is_floating_point()):
            raise InputError(f"{name} is a tensor of floating point, not {_shown(given)}")
    elif name in ("scale", "softcap") and given is not None:
        word = isinstance(given, (str, bytes, bool))
        if word or not hasattr(given, "__float__"):
            raise InputError(f"{name} is a number, not {_shown(given)}")


def _fits(name: str, rows: int, heads: int, q: Tensor) -> None:
    if rows not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise InputError(
            f"a {name} of {rows} batch rows and {heads} heads does not fit {q.shape[0]} rows and "
            f"{q.shape[1]} heads: give it 1 of either, or all"
        )


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return repr(value) if isinstance(value, (str, bool, int, float)) else type(value).__name__
