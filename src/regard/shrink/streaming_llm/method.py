"""StreamingLLM: the first tokens and the most recent ones (Xiao et al., 2023, arXiv 2309.17453)."""

from __future__ import annotations

from torch import Tensor

from regard.core import State
from regard.parts.decoding.eviction import EqualRows
from regard.parts.decoding.kept import ends_and_best
from regard.reach import Call

from .card import Settings


class StreamingLLM(Settings, EqualRows):
    """The first `sinks` tokens and the most recent ones; deviations in `parts.decoding.eviction`.

    >>> StreamingLLM(budget=64).rows(1000)
    64
    """

    name = "StreamingLLM"

    @property
    def least(self) -> int:  # type: ignore[override]
        """One recent token beside the sinks."""
        return self.sinks + 1

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        first = min(self.sinks, rows - 1)
        none = call.k.new_zeros(call.k.shape[:3])
        return ends_and_best(none, first, 0, rows - first)
