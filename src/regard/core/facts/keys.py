"""Facts of keys: what they receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.core import identities
from regard.core.kernels.tiled import Tile
from regard.core.mask import Mask

from .base import Fact, Sums, View, span

_ALL = torch.ones((), dtype=torch.bool)  # every pair of a tile counts


@dataclass(frozen=True)
class Received(Fact):
    """Attention that each key receives, summed over the queries: `[batch, heads, keys]`; a causal
    key j gets at most T - j.

    `band=(lo, hi)` counts only queries lo to hi positions after the key, `queries=(start, stop)`
    only those positions.
    """

    name: ClassVar[str] = "received"
    axis: ClassVar[str] = "keys"
    title: ClassVar[str] = "attention received"
    band: tuple[int, int] | None = None
    queries: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, pair in (("band", self.band), ("queries", self.queries)):
            if pair is not None:
                span(name, pair)

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.keys)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        chosen = self._chosen(tile, view)
        if chosen is None:
            return
        part = tile.received() if chosen is _ALL else tile.times(chosen).sum(-2)
        sums["sum"][tile.batch, tile.heads, :, tile.cols] += part

    def fused(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, scale: float
    ) -> Tensor | None:
        if type(self) is not Received or self != Received():
            return None
        return identities.received(q, k, lse, mask=mask, scale=scale)

    @property
    def swept(self) -> str | None:
        return "received" if self.band is None and self.queries is None else None

    @property
    def near(self) -> int | None:
        return None if self.band is None else max(map(abs, self.band))

    def _chosen(self, tile: Tile, view: View) -> Tensor | None:
        """Which pairs of the tile count, `[rows, cols]`: `_ALL`, a tensor, or None for not one."""
        low, high = tile.reach
        first = tile.rows.start + view.query_offset
        last = tile.rows.stop - 1 + view.query_offset
        whole = True
        if self.band is not None:
            if high < self.band[0] or low > self.band[1]:
                return None
            whole = low >= self.band[0] and high <= self.band[1]
        if self.queries is not None:
            if last < self.queries[0] or first >= self.queries[1]:
                return None
            whole = whole and first >= self.queries[0] and last < self.queries[1]
        if whole:
            return _ALL
        ok = torch.ones(len(tile.i), len(tile.j), dtype=torch.bool, device=tile.i.device)
        if self.band is not None:
            d = tile.i[:, None] - tile.j
            ok &= (d >= self.band[0]) & (d <= self.band[1])
        if self.queries is not None:
            i = torch.arange(first, last + 1, device=ok.device)[:, None]
            ok &= (i >= self.queries[0]) & (i < self.queries[1])
        return ok


@dataclass(frozen=True)
class MeanReceived(Received):
    """Received attention divided by the number of queries that may look at the key: `[batch,
    heads, keys]` in [0, 1].

    The alpha of the sink metric (Gu et al., 2024). A key that no counted query may look at gets 0.
    """

    name: ClassVar[str] = "mean_received"
    title: ClassVar[str] = "mean attention received"

    def begin(self, view: View) -> Sums:
        count = view.zeros(view.keys)
        return {"sum": view.zeros(view.keys), "count": count if view.apart else count[:, :1, :1]}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        super().add(sums, tile, view)
        chosen = self._chosen(tile, view)
        if chosen is None or (tile.heads.start and not view.apart):
            return
        heads = tile.heads if view.apart else slice(None)  # one count where all see the same
        at = (tile.batch, heads, slice(None), tile.cols)
        if chosen is _ALL and tile.allowed is None and tile.live is None:
            sums["count"][at] += len(tile.i)
            return
        seen = torch.ones(
            1, 1, 1, len(tile.i), len(tile.j), dtype=tile.p.dtype, device=tile.p.device
        )
        for factor in (chosen, tile.allowed):
            if factor is not None:
                seen = seen * factor
        if tile.live is not None:
            seen = seen * tile.live[:, None, None, :, None]
        sums["count"][at] += seen.sum(-2)

    def finish(self, sums: Sums) -> Tensor:
        return (sums["sum"] / sums["count"].clamp_min(1)).flatten(1, 2)


@dataclass(frozen=True)
class Influence(MeanReceived):
    """Future attention influence (FAI): mean attention from queries `band` positions later,
    `[batch, heads, keys]`.

    Li et al., 2025 (arXiv 2510.13554); the band is 10 to 50 there, 100 in the revision.
    """

    name: ClassVar[str] = "influence"
    title: ClassVar[str] = "future attention influence"
    positional: ClassVar[bool] = True
    band: tuple[int, int] | None = (10, 50)
