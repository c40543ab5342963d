"""Local and global heads by mean attention distance, and the peaks of a series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from regard.errors import InputError

QUANTILE = 0.3
TOP = 0.4
RULES = ("local", "top")
Head = tuple[int, int]


@dataclass(frozen=True)
class Heads:
    """Local and global heads as (layer, head) pairs; `calibrated` freezes them over responses."""

    local: tuple[Head, ...]
    far: tuple[Head, ...]


def head_split(span: Tensor, layers: Sequence[int], quantile: float = QUANTILE) -> Heads:
    """The most local and most global heads by mean look-back distance, `span [layers, heads]`.

    >>> import torch
    >>> head_split(torch.tensor([[1.0, 9.0], [4.0, 3.0]]), [5, 6], 0.25)
    Heads(local=((5, 0),), far=((5, 1),))
    """
    if not 0 < quantile <= 0.5:
        raise InputError(f"quantile is in (0, 0.5], not {quantile}")
    if span.numel() < 2:
        raise InputError(
            "splitting into local and global heads needs at least two heads: watch more layers"
        )
    count = max(1, round(quantile * span.numel()))
    order = span.flatten().argsort(stable=True).tolist()
    width = span.shape[1]
    pairs = [(int(layers[n // width]), n % width) for n in order]
    return Heads(tuple(pairs[:count]), tuple(pairs[-count:]))


def peaks(values: Tensor, rule: str = "local", top: float = TOP) -> list[int]:
    """Where a series peaks.

    "local": strictly above both neighbours and above the median; "top": the ceil(top * n) largest,
    the earlier of equals first.

    >>> import torch
    >>> peaks(torch.tensor([0.0, 3.0, 1.0, 2.0, 1.0]))
    [1, 3]
    >>> peaks(torch.tensor([0.0, 3.0, 1.0, 2.0, 1.0]), "top", 0.2)
    [1]
    """
    if rule not in RULES:
        raise InputError(f"rule is 'local' or 'top', not {rule!r}")
    if not 0 < top <= 1:
        raise InputError(f"top is in (0, 1], not {top}")
    if len(values) == 0:
        return []
    if rule == "top":
        count = -int(-top * len(values) // 1)
        return sorted(values.argsort(descending=True, stable=True)[:count].tolist())
    inner = values[1:-1]
    high = (inner > values[:-2]) & (inner > values[2:]) & (inner > values.quantile(0.5))
    return (high.nonzero()[:, 0] + 1).tolist()
