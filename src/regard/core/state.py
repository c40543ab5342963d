"""The State of attention over a set of keys, and its algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """Attention of every query over one set of keys.

    Attributes:
        out: weighted mean of the values, `[batch, heads, queries, head_dim]`; 0 for a query that
            sees no key.
        lse: natural log of the summed exponentiated scores, `[batch, heads, queries]`, float32 or
            float64; -inf for a query that sees no key.

    Two States over disjoint key sets merge into the State of their union without ever forming the
    attention matrix.

    >>> one = State(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))
    >>> three = State(torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1))
    >>> merge(one, three).out.flatten().tolist()
    [2.0, 2.0]
    """

    out: Tensor
    lse: Tensor


def merge(*states: State) -> State:
    """State of the union of disjoint key sets: the lse-weighted mean of the outs, the logsumexp of
    the lses.

    Order does not matter; a state with lse -inf (no key seen) changes nothing; all -inf stays (0,
    -inf).
    """
    if not states:
        raise ValueError("merge needs at least one State")
    if len(states) == 1:
        return states[0]
    lse = torch.logsumexp(torch.stack([_finite(s.lse) for s in states]), 0)
    lse = torch.where(lse <= _EMPTY / 2, -torch.inf, lse)
    out = sum(_share(s.lse, lse)[..., None] * s.out.to(lse.dtype) for s in states)
    assert isinstance(out, Tensor)
    return State(out.to(states[0].out.dtype), lse)


def mass(part: State | Tensor, whole: State | Tensor) -> Tensor:
    """Share of each query's attention that falls on `part`, `[batch, heads, queries]` in [0, 1].

    Takes States or their lses. A query that sees no key at all has mass 0 everywhere.
    """
    return _share(_lse(part), _lse(whole))


def rest(
    whole: State,
    part: State,
    recompute: Callable[[], State] | None = None,
    threshold: float | None = None,
) -> State:
    """State of the complement, `whole` minus `part`.

    Subtraction is exact algebra but loses digits where the part holds nearly all the mass: there
    `recompute()` (a masked call over the complement) is used for the rows whose mass exceeds
    `threshold` (0.9, or 0.5 for outs of 16 bits); without it the subtracted values stand.
    """
    if threshold is None:
        threshold = 0.9 if whole.out.dtype.itemsize > 2 else 0.5
    share = mass(part, whole)
    left = (1 - share).clamp_min(torch.finfo(share.dtype).tiny)
    gone = share >= 1
    lse = torch.where(gone, -torch.inf, whole.lse + left.log())
    out = (whole.out.to(lse.dtype) - share[..., None] * part.out.to(lse.dtype)) / left[..., None]
    state = State(torch.where(gone[..., None], 0.0, out).to(whole.out.dtype), lse)
    close = share > threshold
    if recompute is None or not bool(close.any()):
        return state
    exact = recompute()
    return State(
        torch.where(close[..., None], exact.out, state.out),
        torch.where(close, exact.lse, state.lse),
    )


def reweight(states: Sequence[State], masses: Sequence[Tensor | float]) -> State:
    """Give each disjoint key set a new per-query mass and recombine the outs.

    `masses[g]` is a number or `[batch, heads, queries]`. Weights are taken as given; the lse is the
    merged one plus the log of their sum, so masses that add up to one keep it.
    """
    if len(states) != len(masses):
        raise ValueError(f"{len(states)} key sets but {len(masses)} masses: give one mass a set")
    merged = merge(*states).lse
    weights = [torch.as_tensor(m, dtype=merged.dtype, device=merged.device) for m in masses]
    out = sum(
        w.expand(merged.shape)[..., None] * s.out.to(merged.dtype) for w, s in zip(weights, states)
    )
    assert isinstance(out, Tensor)
    total = torch.stack([w.expand(merged.shape) for w in weights]).sum(0)
    return State(out.to(states[0].out.dtype), merged + total.log())


# stands for -inf inside differentiable code: -inf minus -inf would make NaN gradients
_EMPTY = -1e30


def _lse(x: State | Tensor) -> Tensor:
    return x.lse if isinstance(x, State) else x


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == -torch.inf, _EMPTY, lse)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), with 0 for rows that see nothing."""
    empty = (whole == -torch.inf) | (part == -torch.inf)
    return torch.where(empty, 0.0, (_finite(part) - _finite(whole)).masked_fill(empty, 0.0).exp())
