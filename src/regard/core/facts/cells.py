"""Pieces of the map itself: chosen rows and columns, the top keys, a thumbnail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.core.kernels.tiled import Tile
from regard.errors import InputError

from .base import Fact, Sums, View, place


@dataclass(frozen=True)
class TopKeys(Fact):
    """The `k` most attended keys of chosen queries: (values, positions), each `[batch, heads,
    queries, k]`.

    `queries` are absolute positions; None takes the last query of the run.
    """

    name: ClassVar[str] = "top"
    title: ClassVar[str] = "top keys"
    k: int = 8
    queries: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"top takes at least 1 key, got {self.k}")
        _positions("queries", self.queries or ())

    def begin(self, view: View) -> Sums:
        n = len(_within(self.queries, view))
        return {"value": view.zeros(n, self.k), "key": view.zeros(n, self.k).long() - 1}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        for slot, row in enumerate(_within(self.queries, view)):
            if not tile.rows.start <= row < tile.rows.stop:
                continue
            at = (tile.batch, tile.heads, slice(None), slot)
            line = tile.p[..., row - tile.rows.start, :]
            keys = (tile.j + view.key_offset).expand(line.shape)
            value = torch.cat([sums["value"][at], line], -1)
            key = torch.cat([sums["key"][at], keys], -1)
            best = value.topk(self.k, -1)
            sums["value"][at], sums["key"][at] = best.values, key.gather(-1, best.indices)

    def extend(self, old: Sums, new: Sums, view: View) -> Sums:
        if self.queries is None:
            return new
        return {n: torch.cat([old[n], new[n]], 3) for n in new}

    def finish(self, sums: Sums) -> tuple[Tensor, Tensor]:
        return sums["value"].flatten(1, 2), sums["key"].flatten(1, 2)


@dataclass(frozen=True)
class Rows(Fact):
    """Exact attention rows of chosen queries: `[batch, heads, len(queries), keys]`."""

    name: ClassVar[str] = "rows"
    axis: ClassVar[str] = "cells"
    title: ClassVar[str] = "rows"
    queries: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _positions("queries", self.queries)

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(len(_within(self.queries, view)), view.keys)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        for slot, row in enumerate(_within(self.queries, view)):
            if tile.rows.start <= row < tile.rows.stop:
                sums["sum"][tile.batch, tile.heads, :, slot, tile.cols] = tile.p[
                    ..., row - tile.rows.start, :
                ]

    def start(self, sums: Sums, view: View) -> Sums:
        return {"sum": place(sums["sum"], view.key_offset, view.key_offset + view.keys)}

    def extend(self, old: Sums, new: Sums, view: View) -> Sums:
        total = max(view.key_offset + view.keys, old["sum"].shape[-1])
        parts = [place(old["sum"], 0, total), place(new["sum"], 0, total)]
        return {"sum": torch.cat(parts, 3)}


@dataclass(frozen=True)
class Columns(Fact):
    """Exact attention columns of chosen keys: `[batch, heads, queries, len(keys)]`."""

    name: ClassVar[str] = "columns"
    title: ClassVar[str] = "columns"
    keys: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _positions("keys", self.keys)

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.queries, len(self.keys))}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        for slot, key in enumerate(self.keys):
            local = key - view.key_offset - tile.cols.start
            if 0 <= local < len(tile.j):
                sums["sum"][tile.batch, tile.heads, :, tile.rows, slot] = tile.p[..., local]


@dataclass(frozen=True)
class Thumbnail(Fact):
    """The map averaged down to at most `cells` x `cells`: `[batch, heads, query bins, key bins]`,
    rows add up to 1.

    A cell is the share of attention that the queries of its row bin give, on average, to its key
    bin; what a learned sink takes is in none. Bins are a power of two wide, the narrowest that
    fit, so that a map can grow token by token.
    """

    name: ClassVar[str] = "thumbnail"
    axis: ClassVar[str] = "cells"
    title: ClassVar[str] = "thumbnail"
    positional: ClassVar[bool] = True
    cells: int = 64

    def __post_init__(self) -> None:
        if self.cells < 1:
            raise InputError(f"a thumbnail holds at least 1 cell a side, got {self.cells}")

    def width(self, tokens: int) -> int:
        """Tokens per bin for a map of this many tokens."""
        width = 1
        while width * self.cells < tokens:
            width *= 2
        return width

    @property
    def swept(self) -> str | None:
        return "thumbnail"

    def begin(self, view: View) -> Sums:
        end = max(view.query_offset + view.queries, view.key_offset + view.keys)
        n = -(-end // self.width(end))
        return {
            "sum": view.zeros(n, n),
            "width": torch.tensor(self.width(end)),
        }

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        width, n = int(sums["width"]), sums["sum"].shape[-1]
        start = tile.rows.start + tile.shift + view.key_offset
        first = start // width
        last = (start + len(tile.i) - 1) // width
        if first == last:
            part = tile.received()[..., None, :]
        else:
            ends = [min((n + 1) * width - start, len(tile.i)) for n in range(first, last + 1)]
            bins = zip([0, *ends], ends)
            part = torch.stack([tile.p[..., a:b, :].sum(-2) for a, b in bins], -2)
        low, lead = divmod(tile.cols.start + view.key_offset, width)
        part = torch.nn.functional.pad(part, (lead, -(lead + len(tile.j)) % width))
        part = part.unflatten(-1, (-1, width)).sum(-1)
        cols = slice(low, low + part.shape[-1])
        assert max(last + 1, cols.stop) <= n
        sums["sum"][tile.batch, tile.heads, :, first : last + 1, cols] += part

    def complete(self, sums: Sums, lse: Tensor, sinks: Tensor | None, view: View) -> Sums:
        """How many queries of each bin see anything."""
        i = torch.arange(view.queries, device=lse.device) + view.query_offset
        looks = (lse != -torch.inf).to(view.dtype).unflatten(1, (view.kv_heads, view.groups))
        count = view.zeros(sums["sum"].shape[-1])
        count.index_add_(-1, i // int(sums["width"]), looks)
        return {**sums, "count": count[..., None]}

    def extend(self, old: Sums, new: Sums, view: View) -> Sums:
        width, n = int(new["width"]), new["sum"].shape[-1]
        return {
            "sum": _rebin(old, "sum", width, n) + new["sum"],
            "count": _rebin(old, "count", width, n) + new["count"],
            "width": new["width"],
        }

    def finish(self, sums: Sums) -> Tensor:
        return (sums["sum"] / sums["count"].clamp_min(1)).flatten(1, 2)


def _rebin(old: Sums, name: str, width: int, n: int) -> Tensor:
    """Old bins gathered into bins `width` wide and padded to n."""
    x, step = old[name], width // int(old["width"])
    for dim in (-1, -2) if name == "sum" else (-2,):
        x = x.transpose(dim, -1)
        short = -x.shape[-1] % step
        x = torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, step)).sum(-1)
        x = torch.nn.functional.pad(x, (0, n - x.shape[-1])).transpose(dim, -1)
    return x


def _positions(name: str, given: Sequence[int]) -> None:
    if not isinstance(given, Sequence) or any(n < 0 for n in given):
        raise InputError(f"{name} are absolute positions such as (0, 7), not {given!r}")


def _within(queries: tuple[int, ...] | None, view: View) -> list[int]:
    """Rows of this call that hold the chosen absolute positions."""
    if queries is None:
        return [view.queries - 1]
    return [q - view.query_offset for q in queries if 0 <= q - view.query_offset < view.queries]
