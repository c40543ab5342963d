"""Mean attention maps of a UNet: of words on the image, and of the image on itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regard.core import State
from regard.errors import ReachError
from regard.reach import Call, Handler, Site
from regard.reach.denoising import columns, denoising

Grid = tuple[int, int]


class MeanMaps(Handler):
    """Attention of the largest grids, averaged over heads, layers and forwards, with gradients.

    Args:
        cells, self_cells: of cross- and of self-attention, the largest grids of at most so many
            tokens are used; 0 leaves that kind out.
        keys: text columns to keep; all when None.
    """

    def __init__(self, cells: int, self_cells: int = 0, keys: Sequence[int] | None = None) -> None:
        self.limit = {"cross": cells, "self": self_cells}
        self.keys = keys
        self.clear()

    def clear(self) -> None:
        self._sums: dict[tuple[str, Grid], tuple[Tensor, int]] = {}

    def sites(self, sites: list[Site]) -> list[Site]:
        return [s for s in sites if self.limit.get(s.kind)]

    def after(self, call: Call, state: State) -> None:
        place, kind = denoising(call), call.site.kind
        if place.grid is None or place.grid[0] * place.grid[1] > self.limit[kind]:
            return
        keys = self.keys if kind == "cross" and self.keys is not None else range(call.k.shape[2])
        rows = place.conditional if place.index is not None else None
        share = columns(call, state, keys, rows)[0].float()  # [heads, image tokens, keys]
        grid = place.grid[0], place.grid[1]
        total, count = self._sums.get((kind, grid), (0, 0))
        self._sums[kind, grid] = total + share.sum(0), count + len(share)

    def _mean(self, kind: str) -> tuple[Grid, Tensor]:
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
        """`[height, width, text tokens]`, of the first row that the prompt drives."""
        grid, mean = self._mean("cross")
        return mean.unflatten(0, grid)

    def selves(self) -> tuple[Tensor, Grid]:
        """`[tokens, tokens]`, and the grid they form."""
        grid, mean = self._mean("self")
        return mean, grid
