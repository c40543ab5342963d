"""Which query may look at which key: one description, many forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

from .blocks import EMPTY, FULL, block_mask
from .ranges import Range, runs_of, stack

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask:
    """A set of allowed (query, key) pairs, described and never stored as a matrix.

    Positions count in the frame of the keys: with more keys than queries the queries are the
    last ones (query i of T stands at position i + S - T), as in decoding with a cache. Masks
    combine with `&`, `|` and `~`, convert to what kernels want, and can be drawn.

    >>> (Mask.causal() & Mask.window(2)).area(5, 5)
    9
    >>> print(Mask.causal().draw(3))
    ■ ⬚ ⬚
    ■ ■ ⬚
    ■ ■ ■
    """

    # -- the pieces ------------------------------------------------------------------------------
    @staticmethod
    def full() -> Mask:
        """Every query sees every key."""
        return Band(None, None)

    @staticmethod
    def causal() -> Mask:
        """A query sees the keys at or before its own position: j <= i."""
        return Band(None, 0)

    @staticmethod
    def window(n: int) -> Mask:
        """A query sees the keys less than `n` positions away, on either side: |i - j| < n."""
        if _whole("the window", n) < 1:
            raise InputError(f"a window holds at least 1 position, got {n}")
        return Band(n - 1, n - 1)

    @staticmethod
    def band(before: int | None, after: int | None) -> Mask:
        """A query sees `before` positions back and `after` ahead: -after <= i - j <= before; None
        is no limit.

        Negative limits leave out the nearest positions: `band(50, -10)` sees the keys 10 to 50
        back.
        """
        for name, limit in (("before", before), ("after", after)):
            if limit is not None:
                _whole(name, limit)
        return Band(before, after)

    @staticmethod
    def prefix(n: int) -> Mask:
        """Every query sees the first `n` keys (join with `| Mask.causal()` for a prefix language
        model).
        """
        return Prefix(_whole("a prefix", n))

    @staticmethod
    def documents(lengths: Sequence[int]) -> Mask:
        """Packed documents of these lengths: a query sees only its own document."""
        if any(n < 1 for n in lengths):
            raise InputError(f"document lengths must be positive, got {list(lengths)}")
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths)))
        return Segments(ids[None], ids[None])

    @staticmethod
    def segments(query_ids: Tensor, key_ids: Tensor | None = None) -> Mask:
        """A query sees the keys that carry its own id; ids are `[positions]` or `[batch,
        positions]`, -1 sees nothing.
        """
        keys = query_ids if key_ids is None else key_ids
        return Segments(_listed("query_ids", query_ids), _listed("key_ids", keys))

    @staticmethod
    def padding(attention_mask: Tensor) -> Mask:
        """Keys that are real: `attention_mask` is `[batch, keys]`, boolean or integer, true or 1
        for a token, 0 for padding.
        """
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            raise InputError(f"padding is a tensor [batch, keys], not {_given(attention_mask)}")
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            # an additive one, of 0 for tokens, would be read the wrong way round
            raise InputError(
                f"padding is boolean or integer, 1 for a token and 0 for padding, not "
                f"{attention_mask.dtype}: give attention_mask.bool(), or the additive one == 0"
            )
        return Padding(_listed("attention_mask", attention_mask) != 0)

    @staticmethod
    def dense(allowed: Tensor) -> Mask:
        """An explicit boolean matrix, `[queries, keys]` or `[batch, heads or 1, queries, keys]`;
        `to_dense` reads any mask as one.

        >>> allowed = torch.tensor([[True, False], [True, True]])
        >>> torch.equal(Mask.dense(allowed).to_dense(2)[0, 0], allowed)
        True
        """
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise InputError(
                "a dense mask is boolean (true where a query may look); an additive one is a bias"
            )
        if allowed.dim() not in (2, 4):
            raise InputError(
                "a dense mask is [queries, keys] or [batch, heads or 1, queries, keys], not "
                f"{list(allowed.shape)}"
            )
        return Dense(allowed[None, None] if allowed.dim() == 2 else allowed)

    @staticmethod
    def predicate(fn: Predicate, batch: int = 1, heads: int = 1) -> Mask:
        """Any rule `fn(batch, head, query, key) -> bool` on index tensors that broadcast;
        evaluated tile by tile. Say how many rows and heads there are if the rule tells them apart.
        """
        return Rule(fn, batch, heads=heads)

    # -- what a subclass gives, `_cells` or `_at`: positions are absolute, in the frame of the keys
    batch: int = 1  # how many rows and heads are told apart
    heads: int = 1

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        """Allowed pairs `[batch or 1, heads or 1, len(i), len(j)]` for positions i (queries) and
        j (keys).
        """
        b = torch.arange(self.batch, device=i.device)[:, None, None, None]
        h = torch.arange(self.heads, device=i.device)[None, :, None, None]
        cells = self._at(b, h, i[None, None, :, None], j[None, None, None], size)
        return cells.expand(self.batch, cells.shape[1] if cells.dim() == 4 else 1, len(i), len(j))

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """For row blocks i `[n, 2]` and column blocks j `[m, 2]`: (may hold a pair, holds every
        pair), `[n, m]`.
        """
        shape = (len(i), len(j))
        return torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)

    def _swapped(self, size: tuple[int, int]) -> Mask:
        queries, keys = size
        shift = keys - queries

        def turned(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # the new queries are the old keys, and the new frame starts `shift` later
            return self._at(b, h, j + shift, i + shift, size)

        return Rule(turned, self.batch, self, size, self.heads)

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        """The rule at batch rows, heads, queries and keys that broadcast; FlexAttention can compile
        it where it is given point by point.
        """
        cells = self._cells(i.reshape(-1), j.reshape(-1), size)
        rows = b if cells.shape[0] > 1 else torch.zeros_like(b)
        heads = h if cells.shape[1] > 1 else torch.zeros_like(h)
        ii = torch.arange(i.numel(), device=i.device).reshape(i.shape)
        jj = torch.arange(j.numel(), device=j.device).reshape(j.shape)
        return cells[rows, heads, ii, jj]

    def to(self, device: Any) -> Mask:
        """The same mask with what it stores on a device."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {n: v.to(device) for n, v in held.items() if isinstance(v, (Tensor, Mask))}
        return replace(self, **moved) if moved else self  # type: ignore[type-var]

    # -- algebra -----------------------------------------------------------------------------------
    def __and__(self, other: Mask) -> Mask:
        _both(other)
        if isinstance(self, Band) and isinstance(other, Band):
            return Band(_least(self.before, other.before), _least(self.after, other.after))
        for a, b in ((self, other), (other, self)):
            if isinstance(a, Band) and a.before is None and a.after is None:
                return b
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        _both(other)
        return Either(self, other)

    def __invert__(self) -> Mask:
        return self.inner if isinstance(self, Inverse) else Inverse(self)

    # -- forms -------------------------------------------------------------------------------------
    def misfit(self, queries: int, keys: int) -> str | None:
        """Why this mask does not describe a call of that size; None where it does."""
        return None

    def to_dense(self, queries: int, keys: int | None = None, device: Any = None) -> Tensor:
        """The mask as a boolean tensor `[batch or 1, heads or 1, queries, keys]`, as many keys as
        queries by default.

        >>> Mask.causal().to_dense(3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        >>> padded = Mask.causal() & Mask.padding(torch.tensor([[0, 1, 1], [1, 1, 1]]))
        >>> padded.to_dense(1, 3).int().tolist()  # one query, the last position
        [[[[0, 1, 1]]], [[[1, 1, 1]]]]
        """
        return self.cells(queries, queries if keys is None else keys, device=device)

    def is_full(self, queries: int, keys: int) -> bool:
        """Whether every query sees every key (cheap, may say False where only a look at each
        cell would tell).
        """
        if isinstance(self, Band) and self.before is None and self.after is None:
            return True  # a decoding step asks at every length anew
        return bool((self.grid(queries, keys, queries, keys) == FULL).all())

    def is_causal(self, queries: int, keys: int) -> bool:
        """Whether this is the plain lower triangle of as many queries as keys."""
        if not (isinstance(self, Band) and self.after == 0 and queries == keys):
            return False
        return self.before is None or self.before >= keys - 1

    def of_heads(self, chosen: Sequence[int]) -> Mask:
        """The mask of some of its heads, in that order."""
        return self if self.heads == 1 else OfHeads(self, list(chosen))

    def grid(self, queries: int, keys: int, block_q: int, block_k: int) -> Tensor:
        """EMPTY, SOME or FULL for every block, int8 `[query blocks, key blocks]`; SOME may be
        cautious.
        """
        cache: dict[tuple[int, ...], Tensor] = self.__dict__.setdefault("_grids", {})
        key = (queries, keys, block_q, block_k)
        if key not in cache:
            shift = keys - queries
            i = _blocks(queries, block_q) + shift
            j = _blocks(keys, block_k)
            some, every = self._bounds(i, j, (queries, keys))
            cache[key] = (some.to(torch.int8) + (some & every).to(torch.int8)).cpu()
        return cache[key]

    def cells(
        self,
        queries: int,
        keys: int,
        rows: slice = slice(None),
        cols: slice = slice(None),
        device: Any = None,
    ) -> Tensor:
        """Boolean block `[batch or 1, heads or 1, rows, cols]` of the matrix (the whole of it by
        default).
        """
        i = torch.arange(queries, device=device)[rows] + keys - queries
        j = torch.arange(keys, device=device)[cols]
        cells = self._cells(i, j, (queries, keys))
        return cells.expand(*cells.shape[:2], len(i), len(j))

    def columns(self, queries: int, keys: int, index: Tensor) -> Tensor:
        """Whether each query may look at picked keys, `[batch, heads, queries, picked]`.

        `index` `[batch, heads, picked]` names key positions; every head may pick its own.
        """
        unique, where = index.unique(return_inverse=True)
        i = torch.arange(queries, device=index.device) + keys - queries
        cells = self._cells(i, unique, (queries, keys))
        cells = cells.expand(index.shape[0], index.shape[1], queries, len(unique))
        return cells.gather(-1, where[:, :, None].expand(-1, -1, queries, -1))

    def area(self, queries: int, keys: int, head: int = 0) -> Any:
        """Exact number of allowed pairs of one head: an int, or a list with one int a batch row
        where rows differ.
        """
        total = torch.zeros(self.batch, dtype=torch.long)
        for rows, cols, state in self._tiles(queries, keys):
            if state == FULL:
                total += (rows.stop - rows.start) * (cols.stop - cols.start)
            else:
                part = self.cells(queries, keys, rows, cols)
                total += part[:, min(head, part.shape[1] - 1)].sum((-1, -2)).cpu()
        return int(total[0]) if self.batch == 1 else total.tolist()

    def ranges(self, queries: int, keys: int, row: int = 0, head: int = 0) -> list[Range]:
        """The mask of one batch row and head as disjoint `Range`s, exact, in O(queries + keys)
        memory for banded masks.
        """
        runs: list[list[tuple[int, int]]] = []
        for start in range(0, queries, 256):
            part = self.cells(queries, keys, slice(start, start + 256))
            runs += [runs_of(line) for line in _one(part, row, head)]
        return stack(runs)

    def sdpa(self, queries: int, keys: int, device: Any = None) -> dict[str, Any]:
        """Keyword arguments of `torch.nn.functional.scaled_dot_product_attention`; dense only
        where it must be.
        """
        if self.is_full(queries, keys):
            return {}
        if self.is_causal(queries, keys):
            return {"is_causal": True}
        return {"attn_mask": self.cells(queries, keys, device=device)}

    def mask_mod(self, queries: int, keys: int) -> Predicate:
        """The rule in FlexAttention's form: `fn(b, h, q_idx, kv_idx)` with indices that count
        from 0.
        """
        shift = keys - queries
        return lambda b, h, q, k: self._at(b, h, q + shift, k, (queries, keys))

    def block_mask(self, queries: int, keys: int, device: Any = "cpu", block: int = 128) -> Any:
        """FlexAttention `BlockMask`, exact for every batch row and head; blocks that the
        description knows to be full or empty cost no evaluation. The last one is kept: the layers
        of a model ask for the same.
        """
        kept: dict[tuple[Any, ...], Any] = self.__dict__.setdefault("_block_masks", {})
        asked = (queries, keys, str(device), block)
        if asked not in kept:
            kept.clear()
            kept[asked] = block_mask(self, queries, keys, device, block)
        return kept[asked]

    def __getstate__(self) -> dict[str, Any]:
        """Without the block mask, whose rule cannot be sent to other processes."""
        return {n: value for n, value in self.__dict__.items() if n != "_block_masks"}

    def swap(self, queries: int, keys: int) -> Mask:
        """The transposed mask, for a call in which keys and queries trade roles (`keys` queries,
        `queries` keys).
        """
        return self._swapped((queries, keys))

    def draw(self, queries: int, keys: int | None = None, row: int = 0, head: int = 0) -> str:
        """The mask in text, one line a query: ■ allowed, ⬚ not."""
        cells = self.cells(queries, keys or queries)
        return "\n".join(
            " ".join("■" if c else "⬚" for c in line) for line in _one(cells, row, head)
        )

    def _tiles(
        self, queries: int, keys: int, block: int = 256
    ) -> Iterator[tuple[slice, slice, int]]:
        grid = self.grid(queries, keys, block, block)
        for a, b in (grid != EMPTY).nonzero().tolist():
            rows = slice(a * block, min((a + 1) * block, queries))
            cols = slice(b * block, min((b + 1) * block, keys))
            yield rows, cols, int(grid[a, b])


@dataclass(frozen=True, eq=True)
class Band(Mask):
    """-after <= i - j <= before."""

    before: int | None
    after: int | None

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        behind = None if self.before is None else i - j <= self.before
        ahead = None if self.after is None else j - i <= self.after
        if behind is None or ahead is None:
            return behind if behind is not None else i == i if ahead is None else ahead
        return behind & ahead

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        least, most = i[:, None, 0] - j[:, 1] + 1, i[:, None, 1] - 1 - j[:, 0]
        some = torch.ones_like(least, dtype=torch.bool)
        every = some.clone()
        if self.before is not None:
            some, every = some & (least <= self.before), every & (most <= self.before)
        if self.after is not None:
            some, every = some & (most >= -self.after), every & (least >= -self.after)
        return some, every

    def _swapped(self, size: tuple[int, int]) -> Mask:
        return Band(
            self.after, self.before
        )  # a band depends on i - j alone, whichever frame counts


@dataclass(frozen=True, eq=True)
class Prefix(Mask):
    """j < n."""

    n: int

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return j < self.n

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        shape = (len(i), len(j))
        return (j[:, 0] < self.n).expand(shape), (j[:, 1] <= self.n).expand(shape)


@dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Same id, and the id is not negative. Ids of shorter queries belong to the last positions."""

    queries: Tensor
    keys: Tensor

    @property
    def batch(self) -> int:  # type: ignore[override]
        return max(len(self.queries), len(self.keys))

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        queries, keys = self.queries.to(i.device), self.keys.to(i.device)
        shift = keys.shape[1] - queries.shape[1]
        segment = queries[_row(queries, b), i - shift]
        return (segment == keys[_row(keys, b), j]) & (segment >= 0)

    def misfit(self, queries: int, keys: int) -> str | None:
        return _length("segments", self.queries.shape[1], self.keys.shape[1], queries, keys)

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        shift = self.keys.shape[1] - self.queries.shape[1]
        low_q, high_q = _extremes(self.queries.cpu(), i - shift)
        low_k, high_k = _extremes(self.keys.cpu(), j)
        low_q, high_q, low_k, high_k = (
            low_q[:, :, None],
            high_q[:, :, None],
            low_k[:, None],
            high_k[:, None],
        )
        some = (low_q <= high_k) & (low_k <= high_q) & (high_q >= 0) & (high_k >= 0)
        every = (low_q == high_q) & (low_k == high_k) & (low_q == low_k) & (low_q >= 0)
        return some.any(0), every.all(0)


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """The key is a token."""

    valid: Tensor

    @property
    def batch(self) -> int:  # type: ignore[override]
        return len(self.valid)

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return self.valid.to(j.device)[_row(self.valid, b), j]

    def misfit(self, queries: int, keys: int) -> str | None:
        length = self.valid.shape[1]
        return None if length == keys else f"its padding is {length} keys long"

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        low, high = _extremes(self.valid.cpu().to(torch.int8), j)
        shape = (len(i), len(j))
        return (high > 0).any(0).expand(shape), (low > 0).all(0).expand(shape)


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A stored matrix."""

    allowed: Tensor

    @property
    def batch(self) -> int:  # type: ignore[override]
        return len(self.allowed)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.allowed.shape[1]

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        allowed, shift = self.allowed.to(i.device), self.allowed.shape[-1] - self.allowed.shape[-2]
        heads = h if self.heads > 1 else torch.zeros_like(h)
        return allowed[_row(allowed, b), heads, i - shift, j]

    def misfit(self, queries: int, keys: int) -> str | None:
        return _length("matrix", self.allowed.shape[-2], self.allowed.shape[-1], queries, keys)

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        allowed, shift = self.allowed.to(i.device), self.allowed.shape[-1] - self.allowed.shape[-2]
        return allowed[:, :, i - shift][..., j]  # rows, then columns: not cell by cell

    def cells(
        self,
        queries: int,
        keys: int,
        rows: slice = slice(None),
        cols: slice = slice(None),
        device: Any = None,
    ) -> Tensor:
        if self.allowed.shape[-2:] != (queries, keys):
            return super().cells(queries, keys, rows, cols, device)
        return self.allowed[:, :, rows, cols].to("cpu" if device is None else device)


@dataclass(frozen=True, eq=False)
class Rule(Mask):
    """A predicate; when it is another mask transposed, that mask still tells which blocks are
    empty.
    """

    fn: Predicate
    batch: int = 1
    source: Mask | None = None
    size: tuple[int, int] = field(default=(0, 0))
    heads: int = 1

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return self.fn(b, h, i, j).to(i.device)  # what the rule holds may lie elsewhere

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if self.source is None:
            return super()._bounds(i, j, size)
        shift = self.size[1] - self.size[0]
        some, every = self.source._bounds(j + shift, i + shift, self.size)
        return some.T, every.T


def _whole(name: str, n: Any) -> int:
    if not hasattr(n, "__index__") or isinstance(n, bool):
        raise InputError(f"{name} is a whole number of positions, not {_given(n)}")
    return n


def _both(other: Any) -> None:
    if not isinstance(other, Mask):
        raise InputError(f"masks are joined with masks, not with {_given(other)}")


def _given(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    return repr(value) if isinstance(value, (int, float)) else type(value).__name__


def _listed(name: str, ids: Tensor) -> Tensor:
    """`[positions]` or `[batch, positions]` as the latter."""
    if ids.dim() not in (1, 2):
        raise InputError(f"{name} is [positions] or [batch, positions], not {list(ids.shape)}")
    return torch.atleast_2d(ids)


def _length(what: str, held: int, over: int, queries: int, keys: int) -> str | None:
    """Why what a mask stores of `held` queries `over` so many keys does not fit; queries may be
    the last of those.
    """
    if over == keys and held >= queries:
        return None
    return f"its {what} {'are' if what.endswith('s') else 'is'} of {held} queries and {over} keys"


def _row(held: Tensor, b: Tensor) -> Tensor:
    """The batch row of what is stored, where all rows may share one."""
    return b if len(held) > 1 else torch.zeros_like(b)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _blocks(length: int, block: int) -> Tensor:
    starts = torch.arange(0, length, max(block, 1))
    return torch.stack([starts, (starts + block).clamp_max(length)], 1)


def _extremes(ids: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    spans = [ids[:, a:b] for a, b in blocks.tolist()]
    if not spans:
        return ids[:, :0], ids[:, :0]
    return torch.stack([s.amin(1) for s in spans], 1), torch.stack([s.amax(1) for s in spans], 1)


def _one(cells: Tensor, row: int, head: int) -> Tensor:
    """One batch row and head; where all see the same there is one of them."""
    return cells[min(row, cells.shape[0] - 1), min(head, cells.shape[1] - 1)]


# masks made of masks lie in a file of their own, and need the class above
from .compound import Both, Either, Inverse, OfHeads  # noqa: E402
