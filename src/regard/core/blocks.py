"""A mask as blocks of few distinct kinds: the form in which FlexAttention takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .mask import Mask

EMPTY, SOME, FULL = 0, 1, 2


def block_mask(mask: Mask, queries: int, keys: int, device: Any, block: int) -> Any:
    """FlexAttention's `BlockMask`, exact for every batch row and head.

    Its rule looks up in which of the distinct blocks a pair lies, whatever the mask says, so that
    one compiled kernel serves them all. Most masks have few distinct blocks: those of a window are
    the two edges of the band, wherever they lie.
    """
    from torch.nn.attention.flex_attention import BlockMask

    with torch.inference_mode(False):  # it is kept, and may serve a call that wants gradients
        kinds, which = (t.to(device) for t in _kinds(mask, queries, keys, block))
        rows, heads = (n > 1 for n in which.shape[:2])

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            at = which[b if rows else b * 0, h if heads else h * 0, i // block, j // block]
            return kinds[at, i % block, j % block]

        return BlockMask.from_kv_blocks(
            *_listed(which > 1),
            *_listed(which == 1),
            BLOCK_SIZE=block,
            mask_mod=rule,
            seq_lengths=(queries, keys),
        )


class _Kinds:
    """Distinct blocks, numbered as they come: 0 is empty, 1 is full."""

    def __init__(self, block: int) -> None:
        self.block, self.all = block, list[Tensor]()
        self._numbers: dict[bytes, int] = {}
        self.corner(0, 0)
        self.corner(block, block)

    def number(self, kind: Tensor) -> int:
        number = self._numbers.setdefault(kind.numpy().tobytes(), len(self.all))
        if number == len(self.all):
            self.all.append(kind.clone())
        return number

    def corner(self, rows: int, cols: int) -> int:
        """A block of which only so many rows and columns are there."""
        at = torch.arange(self.block)
        return self.number((at[:, None] < rows) & (at < cols))


def _kinds(mask: Mask, queries: int, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """The distinct blocks `[kinds, block, block]` and which of them lies where, `[batch or 1,
    heads or 1, query blocks, key blocks]`.
    """
    grid, mask, kinds = mask.grid(queries, keys, block, block), mask.to("cpu"), _Kinds(block)
    which = (grid == FULL).to(torch.int32)
    # a ragged last block ends where the tokens do, even where every pair in it is allowed
    tall, wide = queries % block or block, keys % block or block
    last, every = slice(-1, None), slice(None)
    for at, rows, cols in (
        ((last, every), tall, block),
        ((every, last), block, wide),
        ((last, last), tall, wide),
    ):
        which[at][grid[at] == FULL] = kinds.corner(rows, cols)
    which = which.expand(mask.batch, mask.heads, -1, -1).clone()
    for a, b in (grid == SOME).nonzero().tolist():
        spans = slice(a * block, (a + 1) * block), slice(b * block, (b + 1) * block)
        cells = mask.cells(queries, keys, *spans)
        cells = F.pad(cells, (0, block - cells.shape[-1], 0, block - cells.shape[-2]))
        which[..., a, b] = torch.tensor([[kinds.number(kind) for kind in row] for row in cells])
    return torch.stack(kinds.all), which


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number and order of the chosen key blocks of each query block, as FlexAttention stores
    them.
    """
    count = chosen.sum(-1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count, order
