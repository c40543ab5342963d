"""Mixers whose decoding keeps a state of fixed size: the parallel pass and the steps agree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.core import Mask

from .operations import EPSILON, operate

HIDDEN = -1e30  # a score that no running maximum notices, yet finite
CHUNK = 64


class Scan(NamedTuple):
    """What a scan remembers of the keys so far: the largest score, and sums of exp(score - largest)
    times the values and times 1.
    """

    largest: Tensor  # [batch, heads]
    values: Tensor  # [batch, heads, value_dim]
    weights: Tensor  # [batch, heads]


def scan(
    s: Tensor, v: Tensor, state: Scan | None = None, live: Tensor | None = None
) -> tuple[Tensor, Scan]:
    """Softmax attention in which every query has the same score for a key, `s` `[batch, heads,
    tokens]`: a cumulative mean of values weighted by exp(s), in float32.

    Args:
        v: `[batch, heads, tokens, value_dim]`.
        state: what earlier tokens left.
        live: `[batch, tokens]`, false for padding, which is left out.

    >>> s, v = torch.zeros(1, 1, 3), torch.arange(3.0).view(1, 1, 3, 1)
    >>> scan(s, v)[0].flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    given = v.dtype
    work = torch.float64 if given == torch.float64 else torch.float32
    s, v = s.to(work), v.to(work)
    if live is not None:
        s = s.masked_fill(~live[:, None], HIDDEN)
    if state is None:
        largest = s.new_full(s.shape[:2], HIDDEN)
        state = Scan(largest, v.new_zeros(*v.shape[:2], v.shape[-1]), torch.zeros_like(largest))
    parts = []
    for start in range(0, s.shape[2], CHUNK):
        part, values = s[..., start : start + CHUNK], v[..., start : start + CHUNK, :]
        tops = torch.cummax(part.detach(), -1).values
        tops = torch.maximum(tops, state.largest.detach()[..., None])  # shifts cancel: no gradient
        earlier = torch.ones(part.shape[-1], part.shape[-1], dtype=torch.bool, device=s.device)
        gap = (part[..., None, :] - tops[..., None]).masked_fill(~earlier.tril(), HIDDEN)
        w = gap.exp()
        if live is not None:
            w = w * live[:, None, None, start : start + CHUNK]
        fade = (state.largest.detach()[..., None] - tops).exp()
        sums = w @ values + fade[..., None] * state.values[..., None, :]
        total = w.sum(-1) + fade * state.weights[..., None]
        parts.append(sums / total.clamp_min(torch.finfo(work).tiny)[..., None])
        state = Scan(tops[..., -1], sums[..., -1, :], total[..., -1])
    return torch.cat(parts, 2).to(given), state


def features(x: Tensor) -> Tensor:
    """[1, x, x (x) x / sqrt 2]: the product of two of them is 1 + q.k + (q.k)^2 / 2."""
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / 2**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


def summed(k: Tensor, v: Tensor, scale: float, live: Tensor | None) -> Tensor:
    """The state of the second-order mixer after these keys: `[batch, kv_heads, features,
    value_dim + 1]`, the last column for the weights.
    """
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    k, v = k.to(work) * scale**0.5, v.to(work)
    state: Tensor | int = 0
    for start in range(0, k.shape[2], CHUNK):
        cut = slice(start, start + CHUNK)
        phi = features(k[:, :, cut])
        if live is not None:
            phi = phi * live[:, None, cut, None]
        wide = torch.cat([v[:, :, cut], torch.ones_like(v[:, :, cut, :1])], -1)
        state = state + phi.transpose(-1, -2) @ wide
    assert isinstance(state, Tensor)
    return state


def second_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    state: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Attention with 1 + s + s^2/2 in place of exp(s), normalised; `state` holds earlier keys."""
    sums, total = operate(q, k, v, "taylor", mask=mask, scale=scale, table=table)
    if state is not None:
        work = state.dtype
        groups = q.shape[1] // k.shape[1]
        phi = features(q.to(work) * scale**0.5)
        old = phi @ state.repeat_interleave(groups, 1)
        sums, total = sums.to(work) + old[..., :-1], total + old[..., -1]
    return (sums / (total + EPSILON)[..., None]).to(v.dtype)


def separate_orders(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """The printed form: orders 0, 1 and 2 each divided by their own sum, squares element by
    element, and added. The first token gives three times its value; sums of order 1 may vanish
    (they are kept away from 0).
    """
    x, y = q * scale**0.5, k * scale**0.5
    out = torch.zeros_like(q[..., :1])
    for a, b, form in (
        (x, y, "one"),
        (x, y, "identity"),
        (x * x / 2**0.5, y * y / 2**0.5, "identity"),
    ):
        sums, total = operate(a, b, v, form, mask=mask, scale=1.0)
        away = torch.where(total < 0, -1.0, 1.0) * total.abs().clamp_min(1e-6)
        out = out + sums / away[..., None]
    return out.to(v.dtype)
