"""Sums over keys weighted by another function of the score than exp: exact, tile by tile.

    out_i = sum_j w(s_ij) v_j / Z_i,    s_ij = scale * q_i . k_j + bias(i - j)

Memory is linear in the length: backward computes the tiles anew. Sums are in float32 whatever the
dtype of the tensors. Pairs that the mask hides have weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import Mask
from regard.core.kernels.tiled import Tile, Tiles
from regard.core.precision import as_given
from regard.errors import InputError

EPSILON = 1e-8


@dataclass(frozen=True)
class Form:
    """A weight as a function of the score, and its derivative."""

    weight: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _sigmoid_slope(s: Tensor) -> Tensor:
    w = torch.sigmoid(s)
    return w * (1 - w)


FORMS: dict[str, Form] = {
    "sigmoid": Form(torch.sigmoid, _sigmoid_slope),
    "elu": Form(lambda s: F.elu(s) + 1, lambda s: s.clamp_max(0).exp()),
    "identity": Form(lambda s: s.clone(), torch.ones_like),
    "one": Form(torch.ones_like, torch.zeros_like),
    "taylor": Form(lambda s: 1 + s + s * s / 2, lambda s: 1 + s),
}


@dataclass(frozen=True)
class Distances:
    """An additive bias of the score that depends on the head and on i - j alone.

    `table` is `[heads, reach]`: its value for i - j = 0, 1, ...; keys ahead have that of 0. Tiles
    take cells of it as of a matrix, which is never formed.
    """

    table: Tensor
    queries: int
    keys: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, self.table.shape[0], self.queries, self.keys)

    def index(self, rows: slice, cols: slice) -> Tensor:
        """i - j of every cell, `[rows, cols]`."""
        i = torch.arange(rows.start, rows.stop, device=self.table.device) + self.keys - self.queries
        j = torch.arange(cols.start, cols.stop, device=self.table.device)
        return (i[:, None] - j).clamp_min(0)

    def __getitem__(self, place: Any) -> Tensor:
        _, rows, cols = place
        return self.table[:, self.index(rows, cols)][None]

    def dense(self) -> Tensor:
        """The matrix `[1, heads, queries, keys]`."""
        return self[..., slice(0, self.queries), slice(0, self.keys)]


def operate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: str | Form,
    *,
    norm: str = "none",
    mask: Mask | None = None,
    scale: float | None = None,
    table: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sums `[batch, heads, queries, value_dim]` and the sum of the weights of each
    query; both carry gradients to q, k, v, table and lse.

    Args:
        q: `[batch, heads, queries, head_dim]`; k, v: `[batch, kv_heads, keys, ...]`, not repeated.
        form: one of `FORMS`, or a weight with its slope.
        norm: "none", "sum" (divide by the sum) or "signed" (by its size, at least 1).
        table: `[heads, reach]`, bias of the score by distance.
        lse: `[batch, heads, queries]`, taken off the score: with that of softmax attention over
            the same keys the form is a function of the log-probability.

    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> out, total = operate(q, k, v, "sigmoid", mask=Mask.causal())
    >>> out.shape, total.shape
    (torch.Size([1, 2, 5, 8]), torch.Size([1, 2, 5]))
    """
    form = FORMS[form] if isinstance(form, str) else form
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with as_given(q):
        sums, total = _Operate.apply(q, k, v, table, lse, mask, scale, form)
        if norm == "sum":
            sums = sums / (total + EPSILON)[..., None]
        elif norm == "signed":
            sums = sums / total.abs().clamp_min(1)[..., None]
        elif norm != "none":
            raise InputError(f"unknown norm {norm!r}: none, sum or signed")
        return sums.to(v.dtype), total


class _Operate(torch.autograd.Function):
    """Sums and totals; backward visits the tiles again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        lse: Tensor | None,
        mask: Mask | None,
        scale: float,
        form: Form,
    ) -> tuple[Tensor, Tensor]:
        call = _Call(q, k, v, table, lse, mask, scale)
        tiles = call.tiles()
        v5 = call.v
        out = v5.new_zeros(*call.groups, call.q.shape[3], v5.shape[-1])
        total = out.new_zeros(out.shape[:-1])
        for tile in tiles:
            w = _weights(tile, form.weight(_scores(tile)))
            out[tile.batch, tile.heads, :, tile.rows] += _apply(
                w, v5[tile.batch, tile.heads, tile.cols]
            )
            total[tile.batch, tile.heads, :, tile.rows] += w.sum(-1)
        ctx.save_for_backward(q, k, v, table, lse)
        ctx.settings = (mask, scale, form)
        return out.flatten(1, 2), total.flatten(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_total: Tensor) -> tuple[Any, ...]:
        q, k, v, table, lse = ctx.saved_tensors
        mask, scale, form = ctx.settings
        with as_given(q):
            call = _Call(q, k, v, table, lse, mask, scale)
            heads = call.groups[1:]
            dout = grad_out.to(call.work).unflatten(1, heads)
            dtotal = grad_total.to(call.work).unflatten(1, heads)
            dq, dk, dv = (torch.zeros_like(x) for x in (call.q, call.k, call.v))
            dlse = dq.new_zeros(dq.shape[:-1])
            dtable = None if table is None else table.new_zeros(table.shape, dtype=call.work)
            for tile in call.tiles():
                b, h, rows, cols = tile.batch, tile.heads, tile.rows, tile.cols
                s = _scores(tile)
                w = _weights(tile, form.weight(s))
                given = dout[b, h, :, rows]
                dv[b, h, cols] += torch.einsum("bhgrc,bhgrd->bhcd", w, given)
                dw = torch.einsum("bhgrd,bhcd->bhgrc", given, call.v[b, h, cols])
                dw += dtotal[b, h, :, rows, None]
                ds = _weights(tile, dw * form.slope(s))
                dlse[b, h, :, rows] -= ds.sum(-1)
                dq[b, h, :, rows] += _apply(ds, call.k[b, h, cols])
                dk[b, h, cols] += torch.einsum("bhgrc,bhgrd->bhcd", ds, call.q[b, h, :, rows])
                if dtable is not None:
                    index = call.distances.index(rows, cols).flatten()
                    by_head = ds.sum(0).flatten(0, 1).flatten(1)
                    whole = slice(h.start * heads[1], h.stop * heads[1])
                    dtable[whole].index_add_(1, index, by_head)
        return (
            (dq * scale).flatten(1, 2).to(q.dtype),
            (dk * scale).to(k.dtype),
            dv.to(v.dtype),
            None if table is None or dtable is None else dtable.to(table.dtype),
            None if lse is None else dlse.flatten(1, 2).to(lse.dtype),
            None,
            None,
            None,
        )


class _Call:
    """The tensors of a call in the dtype of the sums, heads grouped by their keys."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        lse: Tensor | None,
        mask: Mask | None,
        scale: float,
    ) -> None:
        self.work = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.given = (q, k, mask, scale, lse)
        self.groups = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1])
        self.q = q.to(self.work).unflatten(1, self.groups[1:])
        self.k, self.v = k.to(self.work), v.to(self.work)
        self.distances: Any = None
        if table is not None:
            self.distances = Distances(table.to(self.work), q.shape[2], k.shape[2])

    def tiles(self) -> Tiles:
        q, k, mask, scale, lse = self.given
        return Tiles(q, k, mask, scale, bias=self.distances, lse=lse)


def _scores(tile: Tile) -> Tensor:
    """The scores, 0 where the mask hides the pair."""
    return tile.scores if tile.allowed is None else tile.scores * tile.allowed


def _weights(tile: Tile, w: Tensor) -> Tensor:
    return w if tile.allowed is None else w * tile.allowed


def _apply(w: Tensor, v: Tensor) -> Tensor:
    """`[batch, kv, groups, rows, cols] x [batch, kv, cols, dim]`."""
    return torch.matmul(w, v[:, :, None])
