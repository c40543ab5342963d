"""Attention and facts in one sweep on a CPU: a block of query rows against all keys that it sees.

With whole rows of scores one softmax gives the probabilities, from them come out and lse, and
facts sum up the same probabilities: scores are computed once, where the fused kernel and a pass
over tiles compute them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .tiled import MASKED, Size, Tile, Tiles, _product

QUERIES = 64  # of all heads of a group together; products of fewer rows are slow
STEP = 64  # keys are masked and skipped in steps of so many
CELLS = 2**18  # short rows go in blocks of several key heads, up to so many scores
LONGEST = 2**15  # keys; longer rows of a block leave every cache


def why_not(inputs: Inputs) -> str | None:
    """Why whole rows of scores are no way to compute this."""
    if inputs.q.device.type != "cpu":
        return f"it takes CPU tensors, not {inputs.q.device.type}"
    if inputs.k.shape[2] > LONGEST:
        return f"it takes up to {LONGEST} keys, not {inputs.k.shape[2]}"
    return None


def sweep(
    inputs: Inputs,
    visit: Callable[[Tile], None],
    *,
    log_p: bool = False,
    sinks: Tensor | None = None,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `visit` sees every tile of probabilities on the way.

    Args:
        log_p: whether tiles know their entropy.
        sinks: learned sink logit of each head, `[heads]`.
        live: `[batch, queries]`, false for queries whose probabilities are 0 in the tiles.
    """
    call = _Rows(inputs)
    v = inputs.v.to(call.work).contiguous()
    out = v.new_zeros(call.batch, call.kv_heads, call.groups, call.queries, v.shape[-1])
    lse = v.new_full(out.shape[:-1], -torch.inf)
    logits = None
    if sinks is not None:
        logits = sinks.to(call.work).unflatten(0, (call.kv_heads, -1))[..., None]
        lse[:] = logits
    room = call.empty()
    for b, h, rows, block in call.all():
        s = block.scores
        peak = s.amax(-1)
        p = torch.softmax(s, -1, out=room[: s.numel()].view(s.shape))
        level = peak - p.amax(-1).log_()
        share = None
        empty = peak <= MASKED / 2  # false for NaN, which stays
        some_empty = bool(empty.any())
        if some_empty:
            p.masked_fill_(empty[..., None], 0.0)
            level.masked_fill_(empty, -torch.inf)
        if logits is not None:  # one more key, of value 0
            joined = torch.logaddexp(level, logits[h])
            share = (level - joined).exp_().masked_fill_(empty, 0.0)
            p.mul_(share[..., None])
            level = joined
        lse[b, h, :, rows] = level
        target = out[b, h, :, rows]
        for start, stop, column in block.stretches:
            target += _product(p[..., column : column + stop - start], v[b, h, start:stop])
        counted = None if live is None else live[b, rows]
        if counted is not None and not bool(counted.all()):
            hidden = ~counted[:, None, None]
            p.masked_fill_(hidden[..., None], 0.0)
            share = (torch.ones_like(level) if share is None else share).masked_fill(hidden, 0.0)
        entropies = None
        if log_p:  # log p is s - level, and p adds up to its share of all there is to see
            looked = level if share is None else (level * share).masked_fill_(share == 0, 0.0)
            if some_empty:
                looked = looked.masked_fill(empty, 0.0)
            entropies = looked - s.mul_(p).sum(-1)
        for tile, column in block.tiles:
            tile.p = p[..., column : column + tile.cols.stop - tile.cols.start]
            tile.live = counted
            if entropies is not None:  # those of whole rows come with the first tile
                tile.entropies = entropies if column == 0 else torch.zeros(())
            visit(tile)
    return out.flatten(1, 2), lse.flatten(1, 2)


class _Block(NamedTuple):
    """Scores of some query rows over the keys they see, side by side."""

    scores: Tensor
    stretches: list[tuple[int, int, int]]  # first key, last key + 1, column of the first
    tiles: list[tuple[Tile, int]]  # each with the column of its first key


class _Rows(Tiles):
    """Whole rows of scores, block by block."""

    def __init__(self, inputs: Inputs) -> None:
        q, k, _, mask, scale, softcap, bias = inputs
        size = Size(QUERIES, max(k.shape[2], 1), STEP, CELLS)
        super().__init__(q, k, mask, scale, softcap, bias, size=size)

    def all(self) -> Iterator[tuple[slice, slice, slice, _Block]]:
        """(batch, kv heads, queries, block) for all queries that may see a key."""
        for b, h, rows, a in self.places():
            runs = [(start, min(stop, self.keys), state) for start, stop, state in self.plan[a]]
            if runs:
                yield b, h, rows, self._block(b, h, rows, runs)

    def _block(self, b: slice, h: slice, rows: slice, runs: list[tuple[int, int, int]]) -> _Block:
        columns = [0]
        stretches: list[tuple[int, int, int]] = []
        for start, stop, _ in runs:
            if stretches and stretches[-1][1] == start:
                stretches[-1] = (stretches[-1][0], stop, stretches[-1][2])
            else:
                stretches.append((start, stop, columns[-1]))
            columns.append(columns[-1] + stop - start)
        q = self.q[b, h, :, rows]
        # the queries of a group share their keys: one product
        flat = q.reshape(q.shape[0] * q.shape[1], -1, q.shape[-1])
        shape = (len(flat), flat.shape[1], columns[-1])
        s = self.buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        for start, stop, first in stretches:
            k = self.k[b, h, start:stop].reshape(len(flat), -1, flat.shape[-1]).transpose(1, 2)
            to = s[..., first : first + stop - start]
            if len(flat) == 1:  # a batch of one is slower
                torch.mm(flat[0], k[0], out=to[0])
            else:
                torch.bmm(flat, k, out=to)
        s = s.view(*q.shape[:4], columns[-1])
        tiles = []
        for (start, stop, state), column in zip(runs, columns):
            part = s[..., column : column + stop - start]
            tile = self._finish(part, state, b, h, rows, slice(start, stop))
            tiles.append((tile, column))
        return _Block(s, stretches, tiles)
