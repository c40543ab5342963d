"""Facts of queries: how, how far and where they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from regard.core import identities
from regard.core.kernels.tiled import Tile
from regard.core.mask import Mask
from regard.errors import InputError

from .base import Fact, Sums, View, row_sums, span


@dataclass(frozen=True)
class Entropy(Fact):
    """Entropy of each query's attention in nats: `[batch, heads, queries]`, from 0 to log(keys
    seen).
    """

    name: ClassVar[str] = "entropy"
    title: ClassVar[str] = "entropy"
    log_p: ClassVar[bool] = True

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.queries)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        sums["sum"][tile.batch, tile.heads, :, tile.rows] += tile.entropy()

    def fused(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, scale: float
    ) -> Tensor | None:
        return identities.entropy(q, k, lse, mask=mask, scale=scale)

    @property
    def swept(self) -> str | None:
        return "entropy"

    def finish(self, sums: Sums) -> Tensor:
        return sums["sum"].clamp_min(0.0).flatten(1, 2)  # a certain query is 0 but for rounding


@dataclass(frozen=True)
class Distance(Fact):
    """Expected distance |i - j| from each query to what it looks at, in tokens: `[batch, heads,
    queries]`.
    """

    name: ClassVar[str] = "distance"
    title: ClassVar[str] = "distance"
    positional: ClassVar[bool] = True

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.queries)}

    @property
    def swept(self) -> str | None:
        return "distance"

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        total, before = sums["sum"][tile.batch, tile.heads, :, tile.rows], tile.ahead_of(0)
        if before:  # keys that no query stands before: |i - j| = (i - i0) + (i0 - j)
            p, d = tile.p[..., :before], (tile.i[0] - tile.j[:before]).to(tile.p.dtype)
            looked = tile.looked() if before == len(tile.j) else p.sum(-1)
            total += p @ d + looked * (tile.i - tile.i[0]).to(d.dtype)
        if before < len(tile.j):
            away = _away(tile, before)
            total += (tile.p[..., before:] * away).sum(-1)

    def fused(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, scale: float
    ) -> Tensor | None:
        return identities.distance(q, k, lse, mask=mask, scale=scale)


@dataclass(frozen=True)
class WindowedDistance(Fact):
    """Windowed average attention distance (WAAD): expected min(i - j, window), `[batch, heads,
    queries]` in [0, window].

    Li et al., 2025 (arXiv 2510.13554). Only the tiles within the window are touched.
    """

    name: ClassVar[str] = "waad"
    title: ClassVar[str] = "windowed attention distance"
    positional: ClassVar[bool] = True
    window: int = 10

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"the window of waad holds at least 1 token, got {self.window}")

    @property
    def near(self) -> int:
        return self.window

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.queries)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        low, high = tile.reach
        if low >= self.window or high <= -self.window:
            return
        saved = self.window - _away(tile).clamp_max(self.window)
        at = (tile.batch, tile.heads, slice(None), tile.rows)
        sums["sum"][at] -= tile.times(saved).sum(-1)

    def complete(self, sums: Sums, lse: Tensor, sinks: Tensor | None, view: View) -> Sums:
        """The whole window for all that is looked at, less what is nearer."""
        looks = (lse != -torch.inf).to(view.dtype)
        if sinks is not None:  # what a sink takes is looked at nowhere
            learned = sinks if sinks.dim() == 3 else sinks[:, None]
            looks = looks * -torch.expm1(learned.to(lse.dtype) - lse).clamp_max(0.0)
        looks = looks.unflatten(1, (view.kv_heads, view.groups))
        return {"sum": (sums["sum"] + self.window * looks).clamp_min(0.0)}


@dataclass(frozen=True)
class Mass(Fact):
    """Share of each query's attention per key segment: `[batch, heads, queries, segments]`.

    `spans` names half-open position ranges (documents, image spans, chat turns), for example
    `{"system": (0, 20), "question": (20, 64)}`. Segments may overlap or leave gaps.
    """

    name: ClassVar[str] = "mass"
    title: ClassVar[str] = "mass per segment"
    spans: tuple[tuple[str, int, int], ...] = ()

    def __init__(
        self, spans: dict[str, tuple[int, int]] | Sequence[tuple[str, int, int]] = ()
    ) -> None:
        named = spans.items() if isinstance(spans, dict) else [(n, ends) for n, *ends in spans]
        if not named:
            raise InputError('mass needs segments: Mass({"question": (20, 64)})')
        rows = [(str(n), *span(f"segment {n!r}", ends, least=0)) for n, ends in named]
        object.__setattr__(self, "spans", tuple(rows))

    @property
    def segments(self) -> list[str]:
        return [n for n, *_ in self.spans]

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.queries, len(self.spans))}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        j = tile.j + view.key_offset
        member = torch.stack([(j >= a) & (j < b) for _, a, b in self.spans], -1)
        if member.any():
            sums["sum"][tile.batch, tile.heads, :, tile.rows] += row_sums(
                tile.p, member.to(tile.p.dtype)
            )


@dataclass(frozen=True)
class Collision(Fact):
    """Chance that two draws from a query's attention hit the same key, sum_j P_ij^2: `[batch,
    heads, queries]`.
    """

    name: ClassVar[str] = "collision"
    title: ClassVar[str] = "collision"

    def begin(self, view: View) -> Sums:
        return {"sum": view.zeros(view.queries)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        sums["sum"][tile.batch, tile.heads, :, tile.rows] += tile.times(tile.p).sum(-1)

    def fused(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, scale: float
    ) -> Tensor | None:
        return identities.collision(q, k, lse, mask=mask, scale=scale)


@dataclass(frozen=True)
class MaxLogit(Fact):
    """Largest score of each query before the softmax, soft cap and bias included: `[batch, heads,
    queries]`; -inf for a query that sees no key.

    It is the lse plus the log of the largest probability; beside a learned sink whose logit lies
    more than 60 above all scores it is only known to be that far below.
    """

    name: ClassVar[str] = "max_logit"
    title: ClassVar[str] = "largest logit"

    def begin(self, view: View) -> Sums:
        return {"max": view.zeros(view.queries)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        at = (tile.batch, tile.heads, slice(None), tile.rows)
        sums["max"][at] = torch.maximum(sums["max"][at], tile.p.amax(-1))

    def complete(self, sums: Sums, lse: Tensor, sinks: Tensor | None, view: View) -> Sums:
        lse = lse.to(view.dtype).unflatten(1, (view.kv_heads, view.groups))
        return {"max": sums["max"].log() + lse}

    def finish(self, sums: Sums) -> Tensor:
        return sums["max"].flatten(1, 2)


@dataclass(frozen=True)
class LogSumExp(Fact):
    """Log of the summed exponentiated scores of each query: `[batch, heads, queries]`; -inf for a
    query that sees no key.
    """

    name: ClassVar[str] = "lse"
    title: ClassVar[str] = "log-sum-exp"

    def begin(self, view: View) -> Sums:
        return {"lse": view.zeros(view.queries)}

    def add(self, sums: Sums, tile: Tile, view: View) -> None:
        """Nothing: the lse is known before the tiles."""

    def complete(self, sums: Sums, lse: Tensor, sinks: Tensor | None, view: View) -> Sums:
        return {"lse": lse.to(view.dtype).unflatten(1, (view.kv_heads, view.groups))}

    def finish(self, sums: Sums) -> Tensor:
        return sums["lse"].flatten(1, 2)


def _away(tile: Tile, start: int = 0) -> Tensor:
    """|i - j| of the queries and of the keys from `start` on, `[rows, cols]`."""
    shape = (len(tile.i), len(tile.j) - start)
    first = tile.reach[1] - len(tile.i) + 1 - start
    return _distances(*shape, first, tile.p.dtype, tile.p.device)


@lru_cache(maxsize=32)  # the same along a diagonal
def _distances(
    rows: int, cols: int, first: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    i = torch.arange(rows, device=device)[:, None] + first
    return (i - torch.arange(cols, device=device)).abs().to(dtype)
