"""Any mask on a CPU through torch's fused kernel: one call a query block, over the key blocks that
it sees.

Key blocks that the mask leaves empty are never read. Where the rest is one stretch it is read in
place, else its pieces are put side by side. The largest thing that is built is the mask of one
query block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..blocks import EMPTY, FULL
from ..mask import Band, Mask
from . import tiled
from .cpu import not_fused, sound
from .inputs import Inputs
from .tiled import MASKED

BLOCK_Q, BLOCK_K = 256, 128
# below this many queries a call of its own for every query block does not pay
LEAST = 16
CACHED = 2**20  # cells of the largest penalty that is kept for the next query block


def why_not(inputs: Inputs) -> str | None:
    """Why the fused CPU kernel does not compute this exactly, block by block."""
    if inputs.q.shape[2] < LEAST:
        return f"it takes {LEAST} queries or more"
    return not_fused(inputs)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: None = None,
    bias: None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; grouped keys are read in place through a zero stride, never copied.

    The penalty of a hidden key adds nothing to NaN, so calls with NaN among the keys go by tiles.
    """
    mask = mask or Mask.full()
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_zeros(q.shape)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=work)
    step_q, step_k = getattr(mask, "block", (BLOCK_Q, BLOCK_K))
    plan = mask.grid(queries, keys, step_q, step_k)
    cache: dict[tuple[int, ...], Tensor] = {}
    for a, row in enumerate(plan.tolist()):
        rows = slice(a * step_q, min((a + 1) * step_q, queries))
        runs = _runs(row, step_k, keys)
        if not runs:
            continue
        penalty = _penalty(mask, (queries, keys), rows, runs, q.dtype, cache)
        for b in range(batch):
            # the kernel's batch axis holds the key heads, its head axis their queries
            part = q[b, :, rows].unflatten(0, (kv_heads, groups))
            wide = [_pieces(t[b], runs)[:, None].expand(-1, groups, -1, -1) for t in (k, v)]
            extra = None if penalty is None else _share(penalty, b, kv_heads)
            o, e = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                part, *wide, 0.0, False, attn_mask=extra, scale=scale
            )
            o, e = o.flatten(0, 1), e.flatten(0, 1)
            if not sound(e):
                return tiled.forward(q, k, v, mask, scale)
            if extra is not None:
                empty = e <= MASKED / 2
                o = o.masked_fill(empty[..., None], 0.0)
                e = e.masked_fill(empty, -torch.inf)
            out[b, :, rows], lse[b, :, rows] = o, e
    return out, lse


def _runs(row: list[int], step: int, keys: int) -> list[tuple[int, int, bool]]:
    """(first key, last key + 1, whether all of it is seen) of the blocks to read, neighbours of a
    kind joined.
    """
    runs: list[tuple[int, int, bool]] = []
    for c, state in enumerate(row):
        if state == EMPTY:
            continue
        start, stop, whole = c * step, min((c + 1) * step, keys), state == FULL
        if runs and runs[-1][1:] == (start, whole):
            runs[-1] = (runs[-1][0], stop, whole)
        else:
            runs.append((start, stop, whole))
    return runs


def _pieces(x: Tensor, runs: list[tuple[int, int, bool]]) -> Tensor:
    """Keys of the runs, `[kv_heads, keys, dim]`: a view where the runs follow each other."""
    if all(a[1] == b[0] for a, b in pairwise(runs)):
        return x[:, runs[0][0] : runs[-1][1]]
    return torch.cat([x[:, a:b] for a, b, _ in runs], 1)


def _penalty(
    mask: Mask,
    size: tuple[int, int],
    rows: slice,
    runs: list[tuple[int, int, bool]],
    dtype: torch.dtype,
    cache: dict[tuple[int, ...], Tensor],
) -> Tensor | None:
    """0 where the query block may look and MASKED where not, over the runs; None if it may look
    everywhere. Only partly seen blocks are evaluated; a band looks alike along a diagonal.
    """
    if all(whole for *_, whole in runs):
        return None
    key = (rows.stop - rows.start, *(x - rows.start for a, b, _ in runs for x in (a, b)))
    if key in cache:
        return cache[key]
    open_, shut = torch.tensor([0, MASKED], dtype=dtype)
    parts = []
    for start, stop, whole in runs:
        if whole:
            parts.append(torch.zeros(1, 1, key[0], stop - start, dtype=dtype))
        else:
            cells = mask.cells(*size, rows, slice(start, stop))
            parts.append(torch.where(cells, open_, shut))
    lead = [max(p.shape[n] for p in parts) for n in (0, 1)]
    wide = [p.expand(*lead, -1, -1) for p in parts]
    joined = wide[0] if len(wide) == 1 else torch.cat(wide, -1)
    if isinstance(mask, Band) and joined.numel() <= CACHED:
        cache.clear()  # inner query blocks look alike: the last one is enough
        cache[key] = joined
    return joined


def _share(penalty: Tensor, b: int, kv_heads: int) -> Tensor:
    """The penalty of one batch row as `[kv_heads or 1, groups or 1, rows, keys]`."""
    part = penalty[b if len(penalty) > 1 else 0]
    return part[None] if len(part) == 1 else part.unflatten(0, (kv_heads, -1))
