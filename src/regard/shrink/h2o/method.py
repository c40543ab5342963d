"""H2O: recent tokens and heavy hitters (Zhang et al., 2023, arXiv 2306.14048)."""

from __future__ import annotations

from torch import Tensor

from regard.core import State
from regard.parts.decoding.eviction import EqualRows
from regard.parts.decoding.kept import ends_and_best, grouped, observed
from regard.reach import Call

from .card import Settings


class H2O(Settings, EqualRows):
    """Recent tokens, `recent` of the rows, and the heavy hitters: those that received most
    attention from all queries of the prompt; deviations in `parts.decoding.eviction`.
    """

    name = "H2O"
    least = 2

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        last = round(self.recent * rows)
        scores = grouped(observed(call, state, None), call.k.shape[1])
        return ends_and_best(scores, 0, rows - last, last)
