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

    kinds, which = _kinds(mask, queries, keys, block)
    some, full = which > 1, which == 1
    kinds, which = kinds.to(device), which.to(device)
    rows, heads = (n > 1 for n in which.shape[:2])

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = which[b if rows else b * 0, h if heads else h * 0, i // block, j // block]
        return kinds[at, i % block, j % block]

    return BlockMask.from_kv_blocks(
        *_listed(some, device),
        *_listed(full, device),
        BLOCK_SIZE=block,
        mask_mod=rule,
        seq_lengths=(queries, keys),
    )


def _kinds(mask: Mask, queries: int, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """The distinct blocks `[kinds, block, block]`, an empty and a full one first, and which of
    them lies where, `[batch or 1, heads or 1, query blocks, key blocks]`.
    """
    grid, mask = mask.grid(queries, keys, block, block).clone(), mask.to("cpu")
    # a ragged last block ends where the tokens do, even where every pair in it is allowed
    for ragged, edge in ((queries % block, grid[-1]), (keys % block, grid[:, -1])):
        if ragged:
            edge[edge == FULL] = SOME
    kinds = [
        torch.zeros(block, block, dtype=torch.bool),
        torch.ones(block, block, dtype=torch.bool),
    ]
    number = {kind.numpy().tobytes(): n for n, kind in enumerate(kinds)}
    which = (grid == FULL).to(torch.int32)[None, None]
    for a, b in (grid == SOME).nonzero().tolist():
        rows, cols = slice(a * block, (a + 1) * block), slice(b * block, (b + 1) * block)
        cells = mask.cells(queries, keys, rows, cols)
        cells = F.pad(cells, (0, block - cells.shape[-1], 0, block - cells.shape[-2]))
        if which.shape[:2] != cells.shape[:2]:  # the first one tells how many rows and heads
            which = which.repeat(*cells.shape[:2], 1, 1)
        for row, of_row in enumerate(cells):
            for head, kind in enumerate(of_row):
                found = number.setdefault(kind.numpy().tobytes(), len(kinds))
                if found == len(kinds):
                    kinds.append(kind.clone())
                which[row, head, a, b] = found
    return torch.stack(kinds), which


def _listed(chosen: Tensor, device: Any) -> tuple[Tensor, Tensor]:
    """Number and order of the chosen key blocks of each query block, as FlexAttention stores
    them.
    """
    count = chosen.sum(-1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count.to(device), order.to(device)
