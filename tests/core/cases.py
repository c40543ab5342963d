"""Shared cases: random calls over every mask, grouped heads, odd lengths, paddings, empty rows."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core import Mask

SHAPES = {  # batch, heads, kv_heads, queries, keys, head_dim
    "B1-T7-H2-Hkv2-D8": (1, 2, 2, 7, 7, 8),
    "B2-T37-S53-H4-Hkv2-D16": (2, 4, 2, 37, 53, 16),
    "B2-T300-H6-Hkv2-D16": (2, 6, 2, 300, 300, 16),
    "B3-T1-S29-H4-Hkv1-D8": (3, 4, 1, 1, 29, 8),
}


def masks(batch: int, queries: int, keys: int) -> dict[str, Mask | None]:
    """One of each kind for a call of this size; some leave queries without any key."""
    left = torch.arange(keys)[None] >= torch.arange(batch)[:, None] * (keys // 3)
    ids = torch.arange(keys)[None].expand(batch, -1) // max(1, keys // 3)
    rule = Mask.predicate(lambda b, h, i, j: (i + j) % 3 != b % 3, batch)
    return {
        "none": None,
        "full": Mask.full(),
        "causal": Mask.causal(),
        "window": Mask.window(5),
        "causal window": Mask.causal() & Mask.window(5),
        "prefix": Mask.causal() | Mask.prefix(keys // 4 + 1),
        "documents": Mask.causal() & Mask.segments(ids),
        "left padding": Mask.causal() & Mask.padding(left),
        "right padding": Mask.causal() & Mask.padding(left.flip(1)),
        "not window": ~Mask.window(4),
        "rule": rule,
        "band apart": Mask.band(9, -2),
    }


def by_head(batch: int, heads: int, queries: int, keys: int) -> dict[str, Mask]:
    """Masks that differ from head to head, and from row to row: every piece that can carry it."""
    make = torch.Generator().manual_seed(heads)
    dense = Mask.dense(torch.rand(batch, heads, queries, keys, generator=make) < 0.6)
    shared = Mask.dense(torch.rand(1, heads, queries, keys, generator=make) < 0.6)
    rule = Mask.predicate(lambda b, h, i, j: i - j <= 3 * h + b, batch, heads)
    return {
        "dense": dense,
        "rows share": shared,
        "rule": rule,
        "and": dense & Mask.window(keys // 2),
        "or": shared | Mask.prefix(3),
        "not": ~rule,
        "nested": (rule & Mask.causal()) | ~dense,
        "turned": rule.swap(queries, keys).swap(keys, queries),
    }


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v with scores wide enough that attention is far from uniform."""
    batch, heads, kv_heads, queries, keys, dim = shape
    make = torch.Generator().manual_seed(seed)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    out = [
        torch.randn(batch, h, t, dim, generator=make, dtype=torch.float64) * 1.5 for h, t in sizes
    ]
    q, k, v = (t.to(dtype).requires_grad_(grad) for t in out)
    return q, k, v


def close(found: Tensor, true: Tensor, tolerance: float, what: str = "") -> None:
    """Equal up to `tolerance` relative to the largest value; says how far apart otherwise."""
    assert found.shape == true.shape, f"{what}: {tuple(found.shape)} is not {tuple(true.shape)}"
    found, true = found.double(), true.double()
    infinite = torch.isinf(true)
    assert torch.equal(found[infinite], true[infinite]), f"{what}: infinities differ"
    if not bool((~infinite).any()):
        return
    gap = (found - true)[~infinite].abs()
    size = max(1.0, float(true[~infinite].abs().max()))
    assert not torch.isnan(gap).any(), f"{what}: NaN"
    worst, mean = float(gap.max()), float(gap.mean())
    assert worst <= tolerance * size, f"{what}: max {worst:.2e}, mean {mean:.2e} of {size:.2e}"
