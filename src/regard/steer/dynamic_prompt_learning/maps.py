"""Mean attention maps of a UNet: of words on the image, and of the image on itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core import State
from regard.errors import ReachError
from regard.reach import Call, Handler
from regard.reach.denoising import columns, denoising


def noun_maps(words: Tensor, nouns: Sequence[Sequence[int]]) -> Tensor:
    """`[height, width, tokens]` -> `[nouns, height, width]`, the mean over each noun's columns."""
    return torch.stack([words[..., list(at)].mean(-1) for at in nouns])


class MeanMaps(Handler):
    """Attention of the largest grids, averaged over heads, layers and forwards, with gradients."""

    def __init__(self, cells: int, self_cells: int) -> None:
        self.limit = {"cross": cells, "self": self_cells}
        self.clear()

    def clear(self) -> None:
        self._sums: dict[tuple[str, tuple[int, int]], tuple[Tensor, int]] = {}

    def after(self, call: Call, state: State) -> None:
        grid, kind = denoising(call).grid, call.site.kind
        if grid is None or grid[0] * grid[1] > self.limit[kind]:
            return
        share = columns(call, state, range(call.k.shape[2]))[0].float()
        total, count = self._sums.get((kind, grid), (0, 0))
        self._sums[kind, grid] = total + share.sum(0), count + len(share)

    def _mean(self, kind: str) -> tuple[tuple[int, int], Tensor]:
        grids = [g for k, g in self._sums if k == kind]
        if not grids:
            raise ReachError(
                f"no {kind}-attention of this UNet has a grid of at most {self.limit[kind]} "
                "tokens: raise map_cells and self_cells"
            )
        grid = max(grids, key=lambda g: g[0] * g[1])
        total, count = self._sums[kind, grid]
        return grid, total / count

    def words(self) -> Tensor:
        """`[height, width, text tokens]`."""
        grid, mean = self._mean("cross")
        return mean.unflatten(0, grid)

    def selves(self) -> tuple[Tensor, tuple[int, int]]:
        """`[tokens, tokens]`, and the grid they form."""
        grid, mean = self._mean("self")
        return mean, grid
