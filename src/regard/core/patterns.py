"""The named masks that attention kernels are compared on, as `Mask`s with exact areas.

The twelve static and two dynamic patterns of "Long-Context Attention Benchmark" (Bu et al., 2025,
https://arxiv.org/abs/2510.17896), each defined once, by which keys a query may see; dense form,
ranges, blocks and area all follow from that. A pattern is a square over `total` positions.

**Deviations:** where the official predicates and ranges disagree (one extra column in the prefix
masks, twice the global tokens in the global window) the definition in words is followed. Document
lengths are drawn from coarse, reconstructed histograms, not from the corpora.

>>> print(build("prefix_lm_causal", 4, prefix=2).draw(4))
■ ■ ⬚ ⬚
■ ■ ⬚ ⬚
■ ■ ■ ⬚
■ ■ ■ ■
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .mask import Mask

WINDOW, BLOCK = 1024, 1024
Lengths = Sequence[int] | None

# Share of documents by length in tokens, [low, high). Reconstructed by hand to the corpora's rough
# shape (many short documents, a long tail up to the limit that the benchmark names): nobody should
# take them for statistics of the corpora.
CORPORA: dict[str, tuple[tuple[int, int, float], ...]] = {
    "pile": (
        (1, 256, 0.22),
        (256, 512, 0.18),
        (512, 1024, 0.22),
        (1024, 2048, 0.18),
        (2048, 4096, 0.11),
        (4096, 8192, 0.06),
        (8192, 12288, 0.03),
    ),
    "prolong-64k": (
        (1, 1024, 0.20),
        (1024, 4096, 0.25),
        (4096, 16384, 0.20),
        (16384, 32768, 0.15),
        (32768, 65537, 0.20),
    ),
    "prolong-512k": (
        (1, 1024, 0.15),
        (1024, 8192, 0.25),
        (8192, 65536, 0.30),
        (65536, 262144, 0.18),
        (262144, 524289, 0.12),
    ),
}


def documents(total: int, corpus: str | None = None, seed: int = 42) -> list[int]:
    """Lengths of packed documents that add up to `total`, drawn like those of a corpus.

    An interval is chosen by weight, then an integer in it; the last document is cut to what
    remains, and none is empty. The histograms are reconstructed approximations. `corpus` None takes
    "pile" up to 12k positions, "prolong-64k" up to 64k, "prolong-512k" above, as the paper does.

    >>> sum(documents(5000)), min(documents(5000)) >= 1
    (5000, True)
    """
    _positive(total, "total")
    if corpus is None:
        corpus = "pile" if total <= 12288 else "prolong-64k" if total <= 65536 else "prolong-512k"
    if corpus not in CORPORA:
        raise ValueError(f"unknown corpus {corpus!r}: choose one of {', '.join(CORPORA)}")
    make = torch.Generator().manual_seed(seed)
    table = CORPORA[corpus]
    weights = torch.tensor([w for *_, w in table])
    lengths: list[int] = []
    left = total
    while left:
        low, high, _ = table[int(torch.multinomial(weights, 1, generator=make))]
        length = min(int(torch.randint(low, high, (1,), generator=make)), left)
        lengths.append(length)
        left -= length
    return lengths


# -- regular -----------------------------------------------------------------------------------
def full(total: int) -> Mask:
    """Every query sees every key."""
    return Mask.full()


def causal(total: int) -> Mask:
    """k <= q."""
    return Mask.causal()


def full_document(total: int, lengths: Lengths = None, seed: int = 42) -> Mask:
    """The same document."""
    return Mask.documents(_lengths(total, lengths, seed))


def causal_document(total: int, lengths: Lengths = None, seed: int = 42) -> Mask:
    """The same document, and k <= q."""
    return Mask.causal() & full_document(total, lengths, seed)


def sliding_window(total: int, window: int = WINDOW) -> Mask:
    """|q - k| <= window: 2 * window + 1 keys."""
    _positive(window, "window", least=0)
    return Mask.band(window, window)


def sliding_window_causal(total: int, window: int = WINDOW) -> Mask:
    """0 <= q - k <= window: window + 1 keys."""
    _positive(window, "window", least=0)
    return Mask.band(window, 0)


# -- heterogeneous -----------------------------------------------------------------------------
def share_question(total: int, lengths: Lengths = None, seed: int = 42) -> Mask:
    """Causal within a document, and every later document sees all of the first (the question)."""
    lengths = _lengths(total, lengths, seed)
    return Mask.causal() & (Mask.documents(lengths) | Mask.prefix(lengths[0]))


def causal_blockwise(total: int, lengths: Lengths = None, seed: int = 42) -> Mask:
    """Causal within a document, and the last document sees everything before it."""
    lengths = _lengths(total, lengths, seed)
    last = _rows(total, total - lengths[-1], total)
    return Mask.causal() & (Mask.documents(lengths) | last)


def prefix_lm_causal(total: int, prefix: int | None = None, seed: int = 42) -> Mask:
    """k < prefix or k <= q; prefix uniform in 1..total where none is given."""
    prefix = _draw(1, total, seed) if prefix is None else prefix
    _positive(prefix, "prefix")
    return Mask.prefix(prefix) | Mask.causal()


def prefix_lm_document(
    total: int, prefix: int | None = None, lengths: Lengths = None, seed: int = 42
) -> Mask:
    """The same document, and k among its first `prefix` tokens or k <= q.

    One prefix for all documents, uniform in 1..(length of the first) where none is given.
    """
    lengths = _lengths(total, lengths, seed)
    prefix = _draw(1, lengths[0], seed) if prefix is None else prefix
    _positive(prefix, "prefix")
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    early = torch.arange(total) - starts[ids] < prefix
    first = Mask.segments(torch.zeros_like(ids), torch.where(early, 0, -1))
    # documents outermost: whatever lies between two of them is then known to be empty by its block
    return Mask.documents(lengths) & (Mask.causal() | first)


def global_sliding_window(total: int, window: int | None = None, seed: int = 42) -> Mask:
    """|q - k| <= window, or q < window, or k < window: the first tokens see, and are seen by, all.

    The window is uniform in 1..total/3 - 1 where none is given.
    """
    window = _draw(1, max(1, total // 3 - 1), seed) if window is None else window
    _positive(window, "window")
    return Mask.band(window, window) | Mask.prefix(window) | _rows(total, 0, min(window, total))


def block_causal_document(
    total: int, block: int = BLOCK, lengths: Lengths = None, seed: int = 42
) -> Mask:
    """A query sees its document up to the end of its own block.

    Documents are 1 to 8 whole blocks (the last is cut to what remains), so blocks count from 0.
    """
    _positive(block, "block")
    if lengths is None:
        make = torch.Generator().manual_seed(seed)
        lengths, left = [], total
        while left:
            lengths.append(min(block * int(torch.randint(1, 9, (1,), generator=make)), left))
            left -= lengths[-1]
    lengths = _lengths(total, lengths, seed)
    if any(n % block for n in lengths[:-1]):
        raise ValueError(f"documents of block_causal_document are whole blocks of {block} tokens")
    return Steps(block) & Mask.documents(lengths)


# -- dynamic -----------------------------------------------------------------------------------
def block_sparse(total: int, block: int = 64, density: float = 0.2, seed: int = 42) -> Mask:
    """Each query block sees the `density` share of key blocks with the highest random scores.

    `density` is the share kept (1.0 is dense); at least one block is kept.
    """
    _positive(block, "block")
    edges = [*range(0, total, block), total]
    return Blocks.top(edges, edges, density, seed)


def variable_block_sparse(
    total: int, block: int = 128, density: float = 0.2, seed: int = 42
) -> Mask:
    """As `block_sparse`, with block sizes uniform in block/2..3*block/2: a share of blocks is
    kept, so the area varies around that share.
    """
    _positive(block, "block", least=2)
    make = torch.Generator().manual_seed(seed)
    edges = [0]
    while edges[-1] < total:
        size = int(torch.randint(block // 2, 3 * block // 2 + 1, (1,), generator=make))
        edges.append(min(edges[-1] + size, total))
    return Blocks.top(edges, edges, density, seed)


# -- the two pieces that the algebra of masks lacks ----------------------------------------------
@dataclass(frozen=True, eq=True)
class Steps(Mask):
    """floor(k / size) <= floor(q / size): causal from block to block, full within one."""

    size: int

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return j // self.size <= i // self.size

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        i0, i1 = i[:, None, 0] // self.size, (i[:, None, 1] - 1) // self.size
        j0, j1 = j[:, 0] // self.size, (j[:, 1] - 1) // self.size
        return j0 <= i1, j1 <= i0


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """A checkerboard: the blocks decide; `keep` is `[query blocks, key blocks]`.

    Edges are the block borders, from 0 to the number of positions.
    """

    edges_q: Tensor
    edges_k: Tensor
    keep: Tensor

    @classmethod
    def top(
        cls, edges_q: Sequence[int], edges_k: Sequence[int], density: float, seed: int
    ) -> Blocks:
        """Keep the same number of key blocks in every row, by random scores."""
        if not 0 < density <= 1:
            raise ValueError(f"density is the share of blocks kept, above 0 up to 1, not {density}")
        make = torch.Generator().manual_seed(seed)
        shape = (len(edges_q) - 1, len(edges_k) - 1)
        kept = max(1, round(density * shape[1]))
        best = torch.rand(shape, generator=make).topk(kept, dim=1).indices
        keep = torch.zeros(shape, dtype=torch.bool).scatter_(1, best, True)
        return cls(torch.tensor(edges_q), torch.tensor(edges_k), keep)

    @property
    def block(self) -> tuple[int, int]:
        """Tile sizes (queries, keys) in which kernels had better walk this mask."""
        sizes = [e.diff() for e in (self.edges_q, self.edges_k)]
        even = all(len(s) < 2 or bool((s[:-1] == s[0]).all()) for s in sizes)
        return (int(sizes[0][0]), int(sizes[1][0])) if even else (64, 64)

    def __post_init__(self) -> None:
        # which block every position lies in: a look-up compiles where a search does not
        for name, edges in (("_of_q", self.edges_q), ("_of_k", self.edges_k)):
            at = torch.arange(int(edges[-1]), device=edges.device)
            object.__setattr__(self, name, torch.bucketize(at, edges[1:], right=True))

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        of_q, of_k = self._of_q.to(i.device), self._of_k.to(j.device)  # type: ignore[attr-defined]
        return self.keep.to(i.device)[of_q[i], of_k[j]]

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        # how many kept blocks touch each rectangle, from sums over all upper left corners
        sums = torch.zeros(self.keep.shape[0] + 1, self.keep.shape[1] + 1, dtype=torch.long)
        sums[1:, 1:] = self.keep.long().cumsum(0).cumsum(1)
        (a0, a1), (b0, b1) = self._touched(i, self.edges_q), self._touched(j, self.edges_k)
        count = sums[a1][:, b1] - sums[a0][:, b1] - sums[a1][:, b0] + sums[a0][:, b0]
        return count > 0, count == (a1 - a0)[:, None] * (b1 - b0)

    @staticmethod
    def _touched(spans: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.bucketize(spans[:, 0].contiguous(), edges[1:], right=True)
        last = torch.bucketize((spans[:, 1] - 1).contiguous(), edges[1:], right=True)
        return first, last + 1

    def area(self, queries: int, keys: int, head: int = 0) -> int:
        """Exact, from the block sizes alone where the call has the size of the mask."""
        if (queries, keys) != (int(self.edges_q[-1]), int(self.edges_k[-1])):
            return int(super().area(queries, keys))
        kept = self.keep * self.edges_q.diff()[:, None] * self.edges_k.diff()
        return int(kept.sum())


# -- the table -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pattern:
    """One row of the table: what builds the mask, of which kind, and what it says."""

    name: str
    kind: str  # regular, heterogeneous or dynamic
    build: Callable[..., Mask]

    @property
    def definition(self) -> str:
        """The first paragraph of the builder's docstring, in one line."""
        return " ".join((self.build.__doc__ or "").split("\n\n")[0].split())

    @property
    def parameters(self) -> dict[str, Any]:
        """Name and default of every parameter but `total`."""
        given = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in given if p.name != "total"}


_REGULAR = (
    full,
    causal,
    full_document,
    causal_document,
    sliding_window,
    sliding_window_causal,
)
_HETEROGENEOUS = (
    share_question,
    causal_blockwise,
    prefix_lm_causal,
    prefix_lm_document,
    global_sliding_window,
    block_causal_document,
)
_DYNAMIC = (block_sparse, variable_block_sparse)
PATTERNS: dict[str, Pattern] = {
    f.__name__: Pattern(f.__name__, kind, f)
    for kind, group in (
        ("regular", _REGULAR),
        ("heterogeneous", _HETEROGENEOUS),
        ("dynamic", _DYNAMIC),
    )
    for f in group
}


def build(name: str, total: int, **parameters: Any) -> Mask:
    """The mask of a pattern over `total` positions; parameters that a pattern lacks are refused.

    >>> build("sliding_window_causal", 10, window=2).area(10, 10)
    27
    """
    if name not in PATTERNS:
        raise ValueError(f"unknown mask {name!r}: choose one of {', '.join(PATTERNS)}")
    _positive(total, "total")
    pattern = PATTERNS[name]
    extra = sorted(set(parameters) - set(pattern.parameters))
    if extra:
        known = ", ".join(pattern.parameters) or "no parameter"
        raise ValueError(f"the mask {name} takes {known}, not {', '.join(extra)}")
    return pattern.build(total, **parameters)


def _rows(total: int, first: int, stop: int) -> Mask:
    """The queries `[first, stop)` see every key, the others none."""
    at = torch.arange(total)
    chosen = torch.where((at >= first) & (at < stop), 0, -1)
    return Mask.segments(chosen, torch.zeros_like(at))


def _lengths(total: int, lengths: Lengths, seed: int) -> list[int]:
    if lengths is None:
        return documents(total, seed=seed)
    if sum(lengths) != total or any(n < 1 for n in lengths):
        raise ValueError(f"document lengths {list(lengths)} must be positive and add up to {total}")
    return list(lengths)


def _draw(low: int, high: int, seed: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=torch.Generator().manual_seed(seed)))


def _positive(value: int, what: str, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}")
