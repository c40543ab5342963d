"""Attention and facts tile by tile: exact for every mask, soft cap and bias, in memory linear in
the length.

A tile is a block of scores small enough to stay in a processor cache; on a GPU it is larger, for
there every call takes as long as half a million cells. Blocks that the mask leaves empty are never
computed. `forward` keeps a running maximum and sum over the tiles of a query block; `backward`
recomputes the tiles; `Tiles` visits the probabilities of every tile, given the lse of each query,
so that any number of facts are measured in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import EMPTY, FULL
from ..mask import Band, Mask

MASKED = -1e30  # a score that no softmax notices, yet finite: MASKED - MASKED is 0, not NaN
# exp, and the product of its result with the values, slow down a hundredfold where they are
# subnormal; clamped well above that, exp gives a weight that is still far below rounding
LOWEST = {torch.float32: -60.0, torch.float64: -600.0}


class Size(NamedTuple):
    """Queries and keys of a block, the steps in which keys are masked, skipped and joined to
    blocks, and the cells of one tile over batch and heads.
    """

    queries: int
    keys: int
    step: int
    cells: int


SMALL, LARGE = Size(256, 256, 128, 2**19), Size(1024, 2048, 256, 2**24)
SIZES = {"cpu": SMALL}
"""By device; LARGE, 64 MiB of float32, on others."""


@dataclass
class Tile:
    """One block: `scores` is `[batch, kv_heads, groups, rows, cols]`; `i`, `j` are positions in
    the frame of the keys.
    """

    batch: slice
    heads: slice
    rows: slice
    cols: slice
    scores: Tensor
    allowed: Tensor | None  # 1 where allowed, 0 where not, broadcast like scores; None: all allowed
    i: Tensor
    j: Tensor
    scratch: Tensor
    shift: int  # keys - queries: row r of the call stands at position r + shift
    p: Tensor = field(init=False)  # probabilities, where the tile has been exponentiated
    live: Tensor | None = None  # [batch, rows], false for a query that does not count
    entropies: Tensor | None = None  # of the rows, where they are known without the scores
    _received: Tensor | None = None  # read through `received` and `looked`, once for all facts
    _looked: Tensor | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """Least and greatest i - j in the tile."""
        shift = self.shift
        return (
            self.rows.start + shift - self.cols.stop + 1,
            self.rows.stop - 1 + shift - self.cols.start,
        )

    def exponentiate(self, room: Tensor | None = None) -> None:
        """Make `p` of the scores: in `room`, or, which is faster, written over them."""
        size = self.scores.shape
        out = self.scores if room is None else room[: self.scores.numel()].view(size)
        self.p = torch.exp(self.scores, out=out)
        if self.allowed is not None:
            self.p.mul_(self.allowed)

    def entropy(self) -> Tensor:
        """`-p * log p` summed over the keys of the tile."""
        if self.entropies is None:
            if self.p is self.scores:
                raise RuntimeError("the scores are gone: a fact that reads log p sets log_p = True")
            self.entropies = -self.times(self.scores).sum(-1)
        return self.entropies

    def received(self) -> Tensor:
        """`p` summed over the rows."""
        if self._received is None:
            self._received = self.p.sum(-2)
        return self._received

    def looked(self) -> Tensor:
        """`p` summed over the keys."""
        if self._looked is None:
            self._looked = self.p.sum(-1)
        return self._looked

    def ahead_of(self, distance: int) -> int:
        """How many of the keys lie `distance` positions or more before the first query."""
        first = self.rows.start + self.shift - self.cols.start
        return min(max(first - distance + 1, 0), len(self.j))

    def within(self, distance: int) -> Tile | None:
        """The keys that are no further than this from some query; None where none is."""
        low = self.ahead_of(distance + 1)
        last = self.rows.stop - 1 + self.shift - self.cols.start
        high = min(max(last + distance + 1, 0), len(self.j))
        if low == 0 and high == len(self.j):
            return self
        if low >= high:
            return None
        part = slice(low, high)
        cols = slice(self.cols.start + low, self.cols.start + high)
        allowed = self.allowed
        if allowed is not None and allowed.shape[-1] > 1:
            allowed = allowed[..., part]
        # what is known of whole rows is not known of these keys
        near = replace(
            self, cols=cols, scores=self.scores[..., part], allowed=allowed, j=self.j[part],
            entropies=None, _received=None, _looked=None,
        )  # fmt: skip
        near.p = self.p[..., part]
        return near

    def times(self, x: Tensor) -> Tensor:
        """`p * x` in a buffer that the next call overwrites: a fresh tensor this large costs
        more than the product.
        """
        return torch.mul(self.p, x, out=self.scratch[: self.p.numel()].view(self.p.shape))


class Tiles:
    """The score tiles of one attention call, grouped by query block.

    With `lse` the tiles hold log-probabilities.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask | None,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        lse: Tensor | None = None,
        size: Size | None = None,
    ) -> None:
        self.work = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.mask, self.softcap, self.bias = mask or Mask.full(), softcap, bias
        self.batch, heads, self.queries, _ = q.shape
        self.kv_heads, self.keys = k.shape[1], k.shape[2]
        self.groups = heads // self.kv_heads
        q = q.to(self.work) * scale
        self.q = q.unflatten(1, (self.kv_heads, self.groups)).contiguous()
        self.k = k.to(self.work).contiguous()
        self.lse: Tensor | None = None
        if lse is not None:
            # a query that sees nothing has probability 0 everywhere, not NaN
            lse = lse.to(self.work).masked_fill(lse == -torch.inf, -MASKED)
            self.lse = lse.unflatten(1, (self.kv_heads, self.groups))
        self.size = size = size or SIZES.get(q.device.type, LARGE)
        block = min(size.queries, max(self.queries, 1))
        cells = self.groups * block * max(1, min(size.keys, self.keys))  # of one key head
        self.heads_step = max(1, min(self.kv_heads, size.cells // cells))
        self.batch_step = max(1, min(self.batch, size.cells // (cells * self.kv_heads)))
        grid = self.mask.grid(self.queries, self.keys, size.queries, size.step)
        self.plan = [_runs(row, size) for row in grid.tolist()]
        self._cells: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.i = torch.arange(self.queries, device=q.device) + self.keys - self.queries
        self.j = torch.arange(self.keys, device=q.device)
        self.lowest = LOWEST[self.work]
        self._room = self.batch_step * self.heads_step * cells
        self.buffer, self.scratch = self.empty(), self.empty()

    def empty(self) -> Tensor:
        """Room for one tile."""
        return torch.empty(self._room, dtype=self.work, device=self.q.device)

    def blocks(self) -> Iterator[tuple[slice, slice, slice, Iterator[Tile]]]:
        """(batch, kv heads, rows, tiles of that query block) for every query block."""
        for b, h, rows, a in self.places():
            yield b, h, rows, self._row(b, h, a, rows)

    def places(self) -> Iterator[tuple[slice, slice, slice, int]]:
        """(batch, kv heads, rows, number of the query block) of every query block."""
        for b in _slices(self.batch, self.batch_step):
            for h in _slices(self.kv_heads, self.heads_step):
                for a, rows in enumerate(_slices(self.queries, self.size.queries)):
                    yield b, h, rows, a

    def __iter__(self) -> Iterator[Tile]:
        for *_, tiles in self.blocks():
            yield from tiles

    def _row(self, b: slice, h: slice, a: int, rows: slice) -> Iterator[Tile]:
        q = self.q[b, h, :, rows]
        flat = q.reshape(
            q.shape[0] * q.shape[1], -1, q.shape[-1]
        )  # the queries of a group share their keys: one product
        for c0, c1, state in self.plan[a]:
            cols = slice(c0, min(c1, self.keys))
            k = self.k[b, h, cols].reshape(len(flat), -1, flat.shape[-1])
            shape = (len(flat), flat.shape[1], k.shape[1])
            s = self.buffer[: shape[0] * shape[1] * shape[2]].view(shape)
            torch.bmm(flat, k.transpose(1, 2), out=s)
            s = s.view(*q.shape[:4], -1)
            yield self._finish(s, state, b, h, rows, cols)

    def _finish(self, s: Tensor, state: int, b: slice, h: slice, rows: slice, cols: slice) -> Tile:
        if self.softcap is not None:
            s.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.lse is not None:
            s.sub_(self.lse[b, h, :, rows, None])
        if self.bias is not None:
            # a bias of -inf hides its pair; of two such scores the difference must be a number
            s.add_(_grouped(self.bias[..., rows, cols], b, h, self.kv_heads)).clamp_min_(MASKED)
        allowed = None
        if state != FULL:
            allowed, hidden = self._partial(b, h, rows, cols)
            s.masked_fill_(hidden, MASKED)  # added to NaN it would leave NaN
        if self.lse is not None:
            s.clamp_min_(self.lowest)
        return Tile(
            b,
            h,
            rows,
            cols,
            s,
            allowed,
            self.i[rows],
            self.j[cols],
            self.scratch,
            self.keys - self.queries,
        )

    def _partial(self, b: slice, h: slice, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """Block of the mask as a factor (1 or 0), and which pairs are hidden; bands look alike
        along a diagonal.
        """
        key = (rows.start - cols.start, rows.stop - rows.start, cols.stop - cols.start)
        if key in self._cells:
            return self._cells[key]
        cells = self.mask.cells(self.queries, self.keys, rows, cols, self.q.device)
        allowed = _grouped(cells, b, h, self.kv_heads)
        pair = (allowed.to(self.work), ~allowed)
        if isinstance(self.mask, Band):
            self._cells[key] = pair
        return pair


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by running maximum and sum over tiles; `(out, lse)` as the reference gives them."""
    tiles = Tiles(q, k, mask, scale, softcap, bias)
    v = v.to(tiles.work).contiguous()
    out = v.new_zeros(tiles.batch, tiles.kv_heads, tiles.groups, tiles.queries, v.shape[-1])
    lse = v.new_full(out.shape[:-1], -torch.inf)
    for b, h, rows, row in tiles.blocks():
        most, total, mean = None, torch.zeros(()), torch.zeros(())
        for tile in row:
            s = tile.scores
            peak = s.amax(-1) if most is None else torch.maximum(most, s.amax(-1))
            p = s.sub_(peak[..., None]).clamp_min_(tiles.lowest).exp_()
            part = _product(p, v[b, h, tile.cols])
            if most is None:
                total, mean = p.sum(-1), part
            else:
                fade = (most - peak).exp_()
                total, mean = total * fade + p.sum(-1), mean.mul_(fade[..., None]).add_(part)
            most = peak
        if most is None:
            continue
        empty = most <= MASKED / 2  # false for NaN, which stays
        out[b, h, :, rows] = torch.where(empty[..., None], 0.0, mean / total[..., None])
        lse[b, h, :, rows] = torch.where(empty, -torch.inf, most + total.log())
    return out.flatten(1, 2), lse.flatten(1, 2)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and bias; `d score = p * (grad_out . v - grad_out . out + grad_lse)`."""
    tiles = Tiles(q, k, mask, scale, softcap, bias, lse=lse)
    groups = (tiles.kv_heads, tiles.groups)
    k, v = k.to(tiles.work).contiguous(), v.to(tiles.work).contiguous()
    q5, dout = (t.to(tiles.work).unflatten(1, groups) for t in (q, grad_out))
    both = grad_out.to(tiles.work) * out.to(tiles.work)  # in 16 bits the product would overflow
    shift = (grad_lse.to(tiles.work) - both.sum(-1)).unflatten(1, groups)
    dq, dk, dv = torch.zeros_like(q5), torch.zeros_like(k), torch.zeros_like(v)
    dbias = torch.zeros_like(bias, dtype=tiles.work) if bias is not None else None
    for tile in tiles:
        b, h, rows, cols = tile.batch, tile.heads, tile.rows, tile.cols
        p = torch.exp(tile.scores, out=tile.scratch[: tile.scores.numel()].view(tile.scores.shape))
        if tile.allowed is not None:
            p.mul_(tile.allowed)
        ds = (
            _product(dout[b, h, :, rows], v[b, h, cols].transpose(-1, -2))
            .add_(shift[b, h, :, rows, None])
            .mul_(p)
        )
        dv[b, h, cols] += _gather(p, dout[b, h, :, rows])
        if dbias is not None:
            _scatter(dbias, ds, b, h, rows, cols, groups)
        if softcap is not None:
            capped = tile.scores + _rows(lse, tiles, b, h, rows)
            if bias is not None:
                capped = capped - _grouped(bias[..., rows, cols], b, h, tiles.kv_heads)
            ds = ds * (1 - (capped.clamp(-softcap, softcap) / softcap) ** 2)
        dq[b, h, :, rows] += _product(ds, k[b, h, cols]) * scale
        dk[b, h, cols] += _gather(ds, q5[b, h, :, rows]) * scale
    return (
        dq.flatten(1, 2).to(q.dtype),
        dk.to(q.dtype),
        dv.to(grad_out.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _slices(length: int, step: int) -> list[slice]:
    return [slice(a, min(a + step, length)) for a in range(0, length, step)]


def _runs(states: list[int], size: Size) -> list[tuple[int, int, int]]:
    """(first key, last key + 1, state) of the blocks of one row: equal neighbours joined up to
    the keys of a block.
    """
    runs: list[tuple[int, int, int]] = []
    for c, state in enumerate(states):
        start, stop = c * size.step, (c + 1) * size.step
        if runs and runs[-1][1:] == (start, state) and stop - runs[-1][0] <= size.keys:
            runs[-1] = (runs[-1][0], stop, state)
        elif state != EMPTY:
            runs.append((start, stop, state))
    return runs


def _product(p: Tensor, v: Tensor) -> Tensor:
    """`[batch, kv, groups, rows, cols] x [batch, kv, cols, dim]`, keys shared by the group."""
    flat = p.reshape(p.shape[0] * p.shape[1], -1, p.shape[-1])
    return torch.bmm(flat, v.reshape(len(flat), *v.shape[-2:])).view(*p.shape[:4], v.shape[-1])


def _gather(p: Tensor, x: Tensor) -> Tensor:
    """Transposed product, summed over the group: what the keys collect."""
    flat = p.reshape(p.shape[0] * p.shape[1], -1, p.shape[-1])
    x = x.reshape(len(flat), -1, x.shape[-1])
    return torch.bmm(flat.transpose(1, 2), x).view(*p.shape[:2], p.shape[-1], x.shape[-1])


def _grouped(block: Tensor, b: slice, h: slice, kv_heads: int) -> Tensor:
    """`[batch or 1, heads or 1, rows, cols]` as `[batch, kv, groups, rows, cols]` of one chunk,
    broadcast.
    """
    if block.shape[0] > 1:
        block = block[b]
    if block.shape[1] == 1:
        return block[:, :, None]
    return block.unflatten(1, (kv_heads, -1))[:, h]


def _rows(lse: Tensor, tiles: Tiles, b: slice, h: slice, rows: slice) -> Tensor:
    x = lse.masked_fill(lse == -torch.inf, 0.0).unflatten(1, (tiles.kv_heads, tiles.groups))
    return x[b, h, :, rows, None].to(tiles.work)


def _scatter(
    dbias: Tensor, ds: Tensor, b: slice, h: slice, rows: slice, cols: slice, groups: tuple[int, int]
) -> None:
    """Add to the bias gradient, summed over the axes that the bias broadcasts."""
    target = dbias[..., rows, cols]
    if dbias.shape[1] == 1:
        part = ds.sum((1, 2))[:, None]
        target = target[b] if dbias.shape[0] > 1 else target
        target += part if dbias.shape[0] > 1 else part.sum(0, keepdim=True)
        return
    target = target.unflatten(1, groups)[:, h]
    if dbias.shape[0] > 1:
        target[b] += ds
    else:
        target[0] += ds.sum(0)
