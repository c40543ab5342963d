"""Facts of a GPU call: one visit of every tile by a Triton program gives all that it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.mask import Mask

from .base import Fact, Sums, View
from .cells import Thumbnail

NARROW = 128  # tokens of a bin, below which its own sweep does not pay


def sweep(
    facts: Sequence[Fact],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask | None,
    scale: float,
    view: View,
) -> list[Sums | None]:
    """Sums of the facts that one sweep gives, None for the others.

    `lse` is -inf for queries that do not count. Positions are those of the mask: the last query
    stands at the last key.
    """
    none: list[Sums | None] = [None] * len(facts)
    wanted = {f.swept for f in facts} - {None}
    aligned = view.query_offset - view.key_offset == view.keys - view.queries
    width = _width(facts, view)
    if width is None:
        wanted.discard("thumbnail")
    if not wanted or (view.queries != view.keys and not aligned):
        return none
    from regard.core.kernels import triton  # an import of half a second that few ask for

    if triton.available() is not None or not triton.supports(q, k, mask):
        return none
    options: dict[str, Any] = {
        "mask": mask,
        "scale": scale,
        "entropy": "entropy" in wanted,
        "distance": "distance" in wanted,
    }
    if width is None:
        sums = triton.sums(q, k, lse, **options)
    else:
        sums = _by_bins(width, q, k, lse, options)
    counts = None
    if any("count" in f.begin(view) for f in facts if f.swept == "received"):
        # of all scores 0 and a lse of 0, every pair that may look adds 1
        blank = q.new_zeros(view.batch, 1, 1, 16)
        zero = torch.zeros_like(lse[:, :1]).masked_fill(lse[:, :1] == -torch.inf, -torch.inf)
        counts = triton.received(
            blank.expand(-1, -1, view.queries, -1),
            blank.expand(-1, -1, view.keys, -1),
            zero,
            mask=mask,
            scale=1.0,
        )[:, None]
    return [_sums(f, sums, counts, view) for f in facts]


def _width(facts: Sequence[Fact], view: View) -> int | None:
    """Tokens of a bin of the thumbnail that is asked for; None where tiles must give it: there are
    several widths or none, the call goes on from another, or bins are so narrow that tiles are
    faster.
    """
    widths = {f.width(view.keys) for f in facts if isinstance(f, Thumbnail)}
    square = view.queries == view.keys and view.query_offset == view.key_offset == 0
    if not square or len(widths) != 1:
        return None
    width = widths.pop()
    return width if width >= NARROW else None


def _by_bins(
    width: int, q: Tensor, k: Tensor, lse: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """What `triton.sums` gives, and the sums of all cells of a thumbnail: one sweep for the queries
    of every bin.
    """
    from regard.core.kernels import triton

    total, bins = k.shape[2], -(-k.shape[2] // width)

    def binned(x: Tensor) -> Tensor:
        return F.pad(x, (0, bins * width - total)).unflatten(-1, (bins, width)).sum(-1)

    received: Any = 0
    cells, rows = [], []
    for start in range(0, total, width):
        queries = slice(start, start + width)
        part = triton.sums(q[:, :, queries], k, lse[:, :, queries], shift=start, **options)
        columns = part.pop("received")
        received = received + columns
        cells.append(binned(columns))
        rows.append(part)
    by_name = {name: torch.cat([part[name] for part in rows], 2) for name in rows[0]}
    return {**by_name, "received": received, "thumbnail": torch.stack(cells, 2)}


def _sums(fact: Fact, sums: dict[str, Tensor], counts: Tensor | None, view: View) -> Sums | None:
    if fact.swept is None or fact.swept not in sums:
        return None
    total = sums[fact.swept].to(view.dtype).unflatten(1, (view.kv_heads, view.groups))
    if isinstance(fact, Thumbnail):
        return {"sum": total, "width": fact.begin(view)["width"]}
    if counts is not None and "count" in fact.begin(view):
        return {"sum": total, "count": counts.to(view.dtype)}
    return {"sum": total}
