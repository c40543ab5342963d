"""Masks made of masks: both, either, the inverse, and the masks of some heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .mask import Mask


@dataclass(frozen=True, eq=False)
class Pair(Mask):
    """Two masks joined cell by cell."""

    left: Mask
    right: Mask

    @staticmethod
    def join(left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError

    def misfit(self, queries: int, keys: int) -> str | None:
        return self.left.misfit(queries, keys) or self.right.misfit(queries, keys)

    @property
    def batch(self) -> int:  # type: ignore[override]
        return max(self.left.batch, self.right.batch)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(self.left.heads, self.right.heads)

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return self.join(self.left._cells(i, j, size), self.right._cells(i, j, size))

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return self.join(self.left._at(b, h, i, j, size), self.right._at(b, h, i, j, size))

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        left, right = self.left._bounds(i, j, size), self.right._bounds(i, j, size)
        return self.join(left[0], right[0]), self.join(left[1], right[1])


class Both(Pair):
    """Intersection."""

    @staticmethod
    def join(left: Tensor, right: Tensor) -> Tensor:
        return left & right


class Either(Pair):
    """Union."""

    @staticmethod
    def join(left: Tensor, right: Tensor) -> Tensor:
        return left | right


@dataclass(frozen=True, eq=False)
class Inverse(Mask):
    """Complement."""

    inner: Mask

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.inner.batch

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.inner.heads

    def misfit(self, queries: int, keys: int) -> str | None:
        return self.inner.misfit(queries, keys)

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return ~self.inner._cells(i, j, size)

    def _at(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        return ~self.inner._at(b, h, i, j, size)

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        some, every = self.inner._bounds(i, j, size)
        return ~(some & every), ~some


@dataclass(frozen=True, eq=False)
class OfHeads(Mask):
    """Some heads of a mask that tells them apart."""

    inner: Mask
    chosen: list[int]

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.inner.batch

    @property
    def heads(self) -> int:  # type: ignore[override]
        return len(self.chosen)

    def misfit(self, queries: int, keys: int) -> str | None:
        return self.inner.misfit(queries, keys)

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        cells = self.inner._cells(i, j, size)
        return cells if cells.shape[1] == 1 else cells[:, self.chosen]

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.inner._bounds(i, j, size)
