"""A mask as few rectangles, cut along diagonals: the form in which distributed kernels take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_KINDS = {(0, 0): "full", (0, 1): "causal", (1, 0): "inverse", (1, 1): "band"}


class Range(NamedTuple):
    """A rectangle of queries `[q0, q1)` and keys `[k0, k1)`, cut by up to two diagonals.

    `kind`: "full"; "causal" (bottom-right aligned, the last query sees all keys); "inverse"
    (top-left aligned, the first query sees all keys); "band" (both cuts).
    """

    q0: int
    q1: int
    k0: int
    k1: int
    kind: str


def runs_of(line: Tensor) -> list[tuple[int, int]]:
    """Stretches of allowed keys of one query, `(first, last + 1)`.

    >>> runs_of(torch.tensor([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    edges = torch.diff(
        line.to(torch.int8),
        prepend=line.new_zeros(1, dtype=torch.int8),
        append=line.new_zeros(1, dtype=torch.int8),
    )
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()))


def stack(lines: list[list[tuple[int, int]]]) -> list[Range]:
    """Join the key runs of consecutive queries whose ends stand still or step by one into ranges.

    >>> stack([[(0, 1)], [(0, 2)], [(0, 3)]])
    [Range(q0=0, q1=3, k0=0, k1=3, kind='causal')]
    """
    done: list[Range] = []
    open_: list[list[Any]] = []  # [q0, first run, last run, step or None]

    def close(item: list[Any], q1: int) -> None:
        q0, first, last, step = item
        done.append(Range(q0, q1, first[0], last[1], _KINDS[step or (0, 0)]))

    for q, runs in enumerate([*lines, []]):
        left = list(runs)
        still: list[list[Any]] = []
        for item in open_:
            _, _, (a, b), step = item
            following = next(
                (r for r in left if (r[0] - a, r[1] - b) in ([step] if step else _KINDS)), None
            )
            if following is None:
                close(item, q)
            else:
                left.remove(following)
                step = (following[0] - a, following[1] - b)
                still.append([item[0], item[1], following, step])
        open_ = still + [[q, run, run, None] for run in left]
    return sorted(done)
