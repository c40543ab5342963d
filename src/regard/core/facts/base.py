"""What a fact is: how a tile changes its sums, how later calls join, what the sums mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.core.kernels.tiled import Tile
from regard.core.mask import Mask
from regard.errors import InputError

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class View:
    """Where a call stands: sizes, and the absolute position of the first query and of the first
    key.
    """

    batch: int
    kv_heads: int
    groups: int
    queries: int
    keys: int
    query_offset: int
    key_offset: int
    dtype: torch.dtype
    device: torch.device
    apart: bool = False  # whether heads may look at different keys

    def zeros(self, *tail: int) -> Tensor:
        shape = (self.batch, self.kv_heads, self.groups, *tail)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Fact:
    """One fact. `axis` says what the last axis of the result counts: "keys", "queries" or
    "cells".
    """

    name: ClassVar[str] = ""
    axis: ClassVar[str] = "queries"
    title: ClassVar[str] = ""
    log_p: ClassVar[bool] = False  # reads `Tile.entropy()`
    # compares query and key positions: only where both count the same tokens
    positional: ClassVar[bool] = False

    def begin(self, view: View) -> Sums:
        """Sums of a call before its first tile."""
        raise NotImplementedError

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        """Add a tile to the sums, in place."""
        raise NotImplementedError

    def extend(self, old: Sums, new: Sums, view: View) -> Sums:
        """Sums of all calls so far, each as `start` gave them: rows appended, key columns added."""
        if self.axis == "queries":
            return {n: torch.cat([old[n], new[n]], 3) for n in new}
        total = max(view.key_offset + view.keys, next(iter(old.values())).shape[-1])
        return {n: place(old[n], 0, total) + place(new[n], 0, total) for n in new}

    def complete(self, sums: Sums, lse: Tensor, sinks: Tensor | None, view: View) -> Sums:
        """Sums of a call after its last tile; `lse` is -inf for queries that do not count, and
        holds the learned `sinks` `[heads]` too, where there are any.
        """
        return sums

    def start(self, sums: Sums, view: View) -> Sums:
        """The sums of a first call, with keys at their absolute place."""
        if self.axis != "keys" or not view.key_offset:
            return sums
        return {n: place(x, view.key_offset, view.key_offset + view.keys) for n, x in sums.items()}

    def finish(self, sums: Sums) -> Any:
        return sums["sum"].flatten(1, 2)

    def fused(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, scale: float
    ) -> Tensor | None:
        """`sums["sum"]` by an identity over `attend`, a faster way on GPUs; None where there
        is none.
        """
        return None

    @property
    def swept(self) -> str | None:
        """Which result of `sweep` this fact is: "received", "entropy", "distance" or "thumbnail",
        of the whole map; None where it is none of them.
        """
        return None

    @property
    def near(self) -> int | None:
        """Most positions between query and key of the pairs that count; None where all do."""
        return None


def span(name: str, given: Any, least: int | None = None) -> tuple[int, int]:
    """Two whole numbers in order, from `least` on.

    Raises:
        InputError: anything else.
    """
    two = isinstance(given, (tuple, list)) and len(given) == 2
    if not two or not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        raise InputError(f"{name} is two whole numbers such as (0, 10), not {given!r}")
    low, high = given
    if low > high:
        raise InputError(f"{name} goes from the lower to the higher, got {given}")
    if least is not None and low < least:
        raise InputError(f"{name} counts from {least} on, got {given}")
    return low, high


def place(x: Tensor, start: int, total: int) -> Tensor:
    """`x` with its last axis at `start` of `total` positions, zeros elsewhere."""
    if start == 0 and x.shape[-1] == total:
        return x
    return torch.nn.functional.pad(x, (start, total - start - x.shape[-1]))


def row_sums(p: Tensor, columns: Tensor) -> Tensor:
    """`[..., rows, cols] x [cols, n]` in one flat product."""
    return (p.reshape(-1, p.shape[-1]) @ columns).view(*p.shape[:-1], columns.shape[-1])
