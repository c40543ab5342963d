"""Which rows of a sequence lie on which rank, and what a mask means between two such pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..compound import Both
from ..mask import Band, Mask
from .schemes import Shape


class Run(NamedTuple):
    """Consecutive tokens `[start, stop)` of the sequence, stored from row `at` on."""

    start: int
    stop: int
    at: int

    @property
    def rows(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


@dataclass(frozen=True)
class Placement:
    """The rows of every place of the ring, padded to the same length.

    Attributes:
        tokens: length of the sequence.
        runs: for each place of the ring, its runs of tokens; rows between them are padding.
        length: rows of a place; each of its `ulysses` ranks holds an equal slice of them.

    >>> from regard.core.parallel import shape
    >>> place(shape("ring", 2), 8).positions(0).tolist()
    [0, 1, 6, 7]
    """

    grid: Shape
    tokens: int
    runs: tuple[tuple[Run, ...], ...]
    length: int

    @property
    def local(self) -> int:
        """Rows of one rank, padding included."""
        return self.length // self.grid.ulysses

    @property
    def padding(self) -> int:
        """Rows over all ranks that hold no token."""
        return self.length * self.grid.ring - self.tokens

    def positions(self, rank: int) -> Tensor:
        """The token that each row of a rank holds, `[local]`; -1 for padding."""
        place, member = divmod(rank, self.grid.ulysses)
        rows = torch.full((self.length,), -1)
        for run in self.runs[place]:
            rows[run.rows] = torch.arange(run.start, run.stop)
        return rows[member * self.local : (member + 1) * self.local]


def place(
    grid: Shape,
    tokens: int,
    documents: Sequence[int] | None = None,
    zigzag: bool | None = None,
) -> Placement:
    """Deal the rows out as the scheme wants them.

    Zigzag: each document is padded to a multiple of twice the ranks and cut in 2R chunks; place r
    of the ring owns chunks r and 2R - 1 - r, so that causal work is equal. Otherwise the sequence
    as a whole is padded to a multiple of the ranks and cut in order.

    Args:
        documents: lengths that add up to `tokens`; one document when None.
        zigzag: as the scheme has it when None.
    """
    lengths = [tokens] if documents is None else list(documents)
    if tokens < 1 or sum(lengths) != tokens or min(lengths) < 1:
        raise ValueError(
            f"document lengths are positive and add up to the {tokens} tokens, got {lengths[:8]}"
        )
    zigzag = grid.zigzag if zigzag is None else zigzag
    length = local_rows(grid, lengths, zigzag) * grid.ulysses
    if not zigzag:
        cuts = [(r * length, min((r + 1) * length, tokens)) for r in range(grid.ring)]
        rows = tuple((Run(a, b, 0),) if a < b else () for a, b in cuts)
        return Placement(grid, tokens, rows, length)
    runs: list[list[Run]] = [[] for _ in range(grid.ring)]
    at = start = 0
    for n in lengths:
        chunk = -(-n // (2 * grid.ranks)) * grid.ulysses
        for r in range(grid.ring):
            for half, piece in enumerate((r, 2 * grid.ring - 1 - r)):
                first = start + piece * chunk
                last = min(first + chunk, start + n)
                if first < last:
                    runs[r].append(Run(first, last, at + half * chunk))
        at, start = at + 2 * chunk, start + n
    return Placement(grid, tokens, tuple(map(tuple, runs)), length)


def local_rows(grid: Shape, lengths: Sequence[int], zigzag: bool) -> int:
    """Rows of one rank, padding included, without dealing them out.

    >>> from regard.core.parallel import shape
    >>> local_rows(shape("ring", 2), [8], zigzag=True)
    4
    """
    if not zigzag:
        return -(-sum(lengths) // grid.ranks)
    return sum(2 * -(-n // (2 * grid.ranks)) for n in lengths)


class Piece(NamedTuple):
    """A rectangle of the matrix: own rows, another place's rows as keys, and the mask between."""

    queries: Run
    keys: Run
    mask: Mask


def pieces(mask: Mask, placement: Placement, own: int, other: int) -> list[Piece]:
    """The rectangles between two places of the ring in which some query may see some key."""
    mine, theirs = placement.runs[own], placement.runs[other]
    if not mine or not theirs:
        return []
    size = (placement.tokens, placement.tokens)
    i, j = (torch.tensor([run[:2] for run in runs]) for runs in (mine, theirs))
    some, _ = mask._bounds(i, j, size)
    rectangles = []
    for a, b in some.nonzero().tolist():
        part = restrict(mask, mine[a], theirs[b], placement.tokens)
        if part is not None:
            rectangles.append(Piece(mine[a], theirs[b], part))
    return rectangles


def restrict(mask: Mask, queries: Run, keys: Run, tokens: int) -> Mask | None:
    """The part of a mask over `tokens` positions that lies between two runs; None if it is empty.

    >>> whole, run = Mask.causal(), Run(4, 8, 0)
    >>> restrict(whole, run, Run(0, 4, 0), 8).is_full(4, 4), restrict(whole, Run(0, 4, 0), run, 8)
    (True, None)
    """
    i, j = torch.tensor([queries[:2]]), torch.tensor([keys[:2]])
    some, every = mask._bounds(i, j, (tokens, tokens))
    if not bool(some):
        return None
    if bool(every):
        return Mask.full()
    if isinstance(mask, Band):
        # both frames end at their last key; this is how far the two diagonals lie apart
        shift = queries.start - keys.start - (keys.stop - keys.start)
        shift += queries.stop - queries.start
        return Band(
            None if mask.before is None else mask.before - shift,
            None if mask.after is None else mask.after + shift,
        )
    if isinstance(mask, Both):
        left = restrict(mask.left, queries, keys, tokens)
        right = restrict(mask.right, queries, keys, tokens)
        return None if left is None or right is None else left & right
    return Block(mask, queries.start, keys.start, tokens)


@dataclass(frozen=True, eq=False)
class Block(Mask):
    """A rectangle of another mask, whose first query and key stand at `first` and `start`."""

    inner: Mask
    first: int
    start: int
    tokens: int

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.inner.batch

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.inner.heads

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        i = i - (size[1] - size[0]) + self.first
        return self.inner._cells(i, j + self.start, (self.tokens, self.tokens))

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        i = i - (size[1] - size[0]) + self.first
        return self.inner._bounds(i, j + self.start, (self.tokens, self.tokens))
