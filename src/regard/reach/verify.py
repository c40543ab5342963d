"""The first call of every kind: ours and the model's own attention function must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from regard.errors import ReachError

from . import dispatch
from .call import Call
from .handed import Handed

CELLS = 2**22  # queries times keys of a call that is computed twice
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_proven: dict[Any, float] = {}  # kind of call -> largest relative difference


def difference(modules: Iterable[Any]) -> float | None:
    """How far the calls of these modules were from the model's own, the largest relative
    difference; None where none was short enough to be computed twice.
    """
    kinds = {type(m) for m in modules}
    return max((d for kind, d in _proven.items() if kind[0] in kinds), default=None)


def verify(
    call: Call,
    module: Any,
    plain: Callable[..., Any],
    qkv: tuple[Tensor, Tensor, Tensor],
    attention_mask: Any,
    given: dict[str, Any],
) -> None:
    """Compare one call with the function that the model would call, once a kind of module.

    Raises:
        ReachError: they differ: the module computes something else than softmax attention.
    """
    named = frozenset(name for name, x in given.items() if x is not None)
    kind = (type(module), plain, call.site.kind, named, attention_mask is None)
    if kind in _proven or dispatch.captures(module) or call.q.shape[2] * call.k.shape[2] > CELLS:
        return
    if isinstance(attention_mask, Handed):
        if attention_mask.plain is None:
            return
        attention_mask = attention_mask.plain(True)
        if attention_mask is None and given.get("is_causal") is False:
            given = {**given, "is_causal": None}  # what the module says where it meets no mask
    with torch.no_grad():
        true = plain(module, *qkv, attention_mask, **given)[0].transpose(1, 2)
    _compare(kind, call, module, true)


def agree(call: Call, module: Any, plain: Tensor) -> None:
    """Compare one call with what the module made of it by itself, once a kind of module.

    Raises:
        ReachError: as `verify`.
    """
    kind = (type(module), call.site.kind, call.bias is None)
    if kind not in _proven and not dispatch.captures(module):
        _compare(kind, call, module, plain)


def _compare(kind: Any, call: Call, module: Any, true: Tensor) -> None:
    with torch.no_grad():
        state = call.attend()
    # a query that sees nothing has no output: functions differ in what they put there
    seen = (state.lse > -torch.inf)[..., None]
    if call.live is not None:
        seen = seen & call.live[:, None, :, None]
    true, out = true.float() * seen, state.out.float() * seen
    size = true.abs().max().clamp_min(1e-6)
    difference = float((true - out).abs().max() / size)
    if not difference <= _TOLERANCE.get(call.q.dtype, 6e-2) and bool(torch.isfinite(size)):
        raise ReachError(
            f"{call.site.name} does not compute softmax attention of what it hands over (the "
            f"output of {type(module).__name__} differs by {difference:.1e}), so its facts would "
            'be wrong: load the model with attn_implementation="sdpa" or "eager"'
        )
    _proven[kind] = difference
