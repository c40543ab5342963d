"""Facts of a GPU call: one visit of every tile by a Triton program gives all that it can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.mask import Mask

from .base import Fact, Sums, View


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
    if not wanted or (view.queries != view.keys and not aligned):
        return none
    from regard.core.kernels import triton  # an import of half a second that few ask for

    if triton.available() is not None or not triton.supports(q, k, mask):
        return none
    found = triton.sums(
        q,
        k,
        lse,
        mask=mask,
        scale=scale,
        entropy="entropy" in wanted,
        distance="distance" in wanted,
    )
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
    return [_sums(f, found, counts, view) for f in facts]


def _sums(fact: Fact, found: dict[str, Tensor], counts: Tensor | None, view: View) -> Sums | None:
    if fact.swept is None:
        return None
    total = found[fact.swept].to(view.dtype).unflatten(1, (view.kv_heads, view.groups))
    if counts is not None and "count" in fact.begin(view):
        return {"sum": total, "count": counts.to(view.dtype)}
    return {"sum": total}
