"""The few key columns that ACT reads: which, in what order, and who may look at them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Mask

STEP = 128  # keys are left out in steps of so many


@dataclass(frozen=True, eq=False)
class Picked(Mask):
    """A mask over picked keys: `order` `[batch, heads, picked]` ascends, `valid` marks real ones.

    `size` is (queries, keys) of the call that the keys were picked from.
    """

    inner: Mask
    order: Tensor
    valid: Tensor
    size: tuple[int, int]

    @property
    def batch(self) -> int:  # type: ignore[override]
        return len(self.order)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.order.shape[1]

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        order, valid = self.order[..., j][:, :, None], self.valid[..., j][:, :, None]
        b, h = (torch.arange(n, device=order.device) for n in order.shape[:2])
        rows = (i + self.size[1] - size[1])[:, None]
        return (
            self.inner._at(b[:, None, None, None], h[:, None, None], rows, order, self.size) & valid
        )

    def _bounds(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        order, valid = self.order.cpu(), self.valid.cpu()
        low = order[..., j[:, 0]].amin((0, 1))
        high = order[..., j[:, 1] - 1].amax((0, 1)) + 1
        rows, keys = i + self.size[1] - size[1], torch.stack([low, high], -1)
        some, every = self.inner._bounds(rows, keys, self.size)
        return some, every & valid[..., j[:, 1] - 1].all(0).all(0)


def pick(mask: Mask, chosen: Tensor, queries: int) -> Picked:
    """The chosen keys `[batch, heads, keys]` of every head in order, as many as the head with the
    most has; the others repeat their last.
    """
    flat = chosen.flatten(0, 1)
    keys = flat.nonzero()[:, 1]
    count = flat.sum(-1)
    step = torch.arange(int(count.max()), device=chosen.device)
    place = torch.minimum(step, (count - 1).clamp_min(0)[:, None])
    place = place + (count.cumsum(0) - count)[:, None]
    shape = (*chosen.shape[:2], len(step))
    order = keys[place.clamp_max(len(keys) - 1)].view(shape)
    valid = (step < count[:, None]).view(shape)
    return Picked(mask, order, valid, (queries, chosen.shape[-1]))


def lines(mask: Mask, b: int, h: int, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Which keys a few queries of one batch row and head may look at, `[rows, keys]`; keys past the
    last that any of them sees are left out.
    """
    queries, keys = size
    at = rows + keys - queries
    ends = torch.arange(0, keys, STEP)
    blocks = torch.stack([ends, (ends + STEP).clamp_max(keys)], -1)
    span = torch.stack([at.min(), at.max() + 1]).cpu()[None]
    seen = mask._bounds(span, blocks, size)[0][0].nonzero()
    keys = int(blocks[seen.max(), 1]) if len(seen) else 1
    cells = mask._cells(at, torch.arange(keys, device=rows.device), size)
    return cells[b if len(cells) > 1 else 0, h if cells.shape[1] > 1 else 0].expand(-1, keys)


def alike(chosen: Tensor, queries: int) -> list[list[int]]:
    """The heads that have chosen keys, those of about as many together, so that little is padded.

    >>> alike(torch.arange(9) < torch.tensor([[1, 8, 0, 9]])[..., None], queries=100)
    [[0], [1, 3]]
    """
    most = chosen.sum(-1).amax(0).tolist()
    groups: dict[int, list[int]] = {}
    for head, count in enumerate(most):
        if count:  # one query costs nothing: all its heads go together
            groups.setdefault(count.bit_length() if queries > 1 else 0, []).append(head)
    return list(groups.values())
