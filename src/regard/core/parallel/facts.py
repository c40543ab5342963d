"""Facts of a sequence that is dealt out to ranks, equal to those of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..facts.base import Fact, Sums, View
from ..facts.cells import Rows, TopKeys
from ..kernels.tiled import Tile, Tiles
from ..mask import Mask
from ..precision import as_given
from .attention import Parallel
from .placement import Piece


def measure(
    run: Parallel,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    facts: Sequence[Fact],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> list[Sums]:
    """Sums of every fact over the whole sequence, on every rank; `fact.finish(sums)` gives the
    result, as with `core.measure`.

    Args:
        q: `[batch, heads, rows, head_dim]`; k: `[batch, kv_heads, rows, head_dim]`, own rows only.
        lse: `[batch, heads, rows]`, of `Parallel.attend` on the same call.
        sinks: learned sink logit of each head, `[heads]`, which the lse holds too.

    The keys go round once more, rows stay where they are, and column sums are added over ranks. A
    rank holds one number a token, head and fact, never a matrix.

    Raises:
        ValueError: a fact that does not add up over pieces (chosen rows, top keys).
    """
    check(facts)
    run._check(q, k)
    with torch.no_grad(), as_given(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        heads, kv_heads = q.shape[1], k.shape[1]
        q, k = run.share(q, k)
        lse = run.comm.to_heads(lse, "lse")
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        groups = q.shape[1] // k.shape[1]
        whole = _view(q, k, groups, work, 0, run.tokens, 0, run.tokens)
        sums = [fact.begin(whole) for fact in facts]
        for source, keys in run.rounds(k, "keys"):
            for piece in run.pieces(run.comm.place, source, mask):
                _add(facts, sums, q, keys, lse, piece, scale, softcap)
        # own rows at their places in the sequence: the others do not count here
        placed = lse.new_full((*lse.shape[:2], run.tokens), -torch.inf)
        for own in run.placement.runs[run.comm.place]:
            placed[:, :, own.start : own.stop] = lse[:, :, own.rows]
        if sinks is not None:
            sinks = sinks.unflatten(0, (run.grid.ulysses, -1))[run.comm.member]
        sums = [fact.complete(s, placed, sinks, whole) for fact, s in zip(facts, sums)]
        return [_join(run, s, heads, kv_heads) for s in sums]


def check(facts: Sequence[Fact]) -> None:
    """Refuse the facts that do not add up over pieces of the map."""
    for fact in facts:
        if isinstance(fact, (Rows, TopKeys)):
            raise ValueError(
                f"the fact {fact.name!r} does not add up over ranks: ask for received, entropy, "
                "distance, mass, columns or thumbnail, or watch in one process"
            )


def _view(
    q: Tensor, k: Tensor, groups: int, work: Any, first: int, stop: int, start: int, end: int
) -> View:
    return View(
        q.shape[0], k.shape[1], groups, stop - first, end - start, first, start, work, q.device
    )


def _add(
    facts: Sequence[Fact],
    sums: list[Sums],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    piece: Piece,
    scale: float,
    softcap: float | None,
) -> None:
    """The tiles of one piece, added where they belong in the sums over the whole sequence."""
    own, other = piece.queries, piece.keys
    q, k, lse = q[:, :, own.rows], k[:, :, other.rows], lse[:, :, own.rows]
    tiles = _Placed(q, k, piece.mask, scale, softcap, lse, own.start, other.start)
    span = (own.start, own.stop, other.start, other.stop)
    view = _view(q, k, tiles.groups, tiles.work, *span)
    parts = [_part(fact, total, piece) for fact, total in zip(facts, sums)]
    room = tiles.empty() if any(f.log_p for f in facts) else None
    for tile in tiles:
        tile.exponentiate(room)
        for fact, part in zip(facts, parts):
            fact.add(part, tile, view)


def _part(fact: Fact, sums: Sums, piece: Piece) -> Sums:
    """Views of the sums: the columns of a fact of keys, the rows of a fact of queries."""
    if fact.axis == "keys":
        return {n: x[..., piece.keys.start : piece.keys.stop] for n, x in sums.items()}
    if fact.axis == "queries":
        return {n: x[:, :, :, piece.queries.start : piece.queries.stop] for n, x in sums.items()}
    return sums


class _Placed(Tiles):
    """Tiles whose queries and keys stand anywhere in the sequence, not aligned at the end."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask,
        scale: float,
        softcap: float | None,
        lse: Tensor,
        first: int,
        start: int,
    ) -> None:
        super().__init__(q, k, mask, scale, softcap, lse=lse)
        self.apart = first - start
        self.i = torch.arange(self.queries, device=q.device) + self.apart

    def _row(self, b: slice, h: slice, a: int, rows: slice) -> Iterator[Tile]:
        for tile in super()._row(b, h, a, rows):
            tile.shift = self.apart
            yield tile


def _join(run: Parallel, sums: Sums, heads: int, kv_heads: int) -> Sums:
    """Sums over all ranks, with the heads of every rank in their place."""
    comm = run.comm
    member, ulysses = comm.member, run.grid.ulysses
    joined: Sums = {}
    for name, x in sums.items():
        if x.dim() < 4:  # a setting, the same everywhere
            joined[name] = x
            continue
        if x.shape[1] * x.shape[2] * ulysses != heads:  # counts hold for every head
            joined[name] = comm.sum(x if member == 0 else torch.zeros_like(x))
            continue
        whole = x.new_zeros(x.shape[0], heads, *x.shape[3:])
        own = slice(member * heads // ulysses, (member + 1) * heads // ulysses)
        whole[:, own] = x.flatten(1, 2)
        joined[name] = comm.sum(whole).unflatten(1, (kv_heads, heads // kv_heads))
    return joined
