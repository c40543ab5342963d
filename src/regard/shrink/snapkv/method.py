"""SnapKV: what the end of the prompt looks at (Li et al., 2024, arXiv 2404.14469)."""

from __future__ import annotations

from torch import Tensor

from regard.core import State
from regard.parts.decoding.eviction import EqualRows
from regard.parts.decoding.kept import ends_and_best, grouped, observed, pooled
from regard.reach import Call

from .card import Settings


class SnapKV(Settings, EqualRows):
    """The last `window` tokens, and the earlier ones that they look at most; deviations in
    `parts.decoding.eviction`.

    A budget that the window fills keeps recent tokens alone.

    >>> import regard, torch
    >>> model = regard.zoo.tiny("llama")
    >>> with torch.no_grad(), regard.apply(model, method := SnapKV(ratio=0.25, window=4)):
    ...     ids = model.generate(torch.arange(3, 83)[None], max_new_tokens=1)
    >>> method.nbytes / method.full_nbytes
    0.25
    """

    name = "SnapKV"

    @property
    def least(self) -> int:  # type: ignore[override]
        """One token beside the window."""
        return self.window + 1

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        last = min(self.window, rows)
        scores = grouped(observed(call, state, self.window), call.k.shape[1])
        # the window's own columns do not leak into their neighbours' averages
        scores[..., scores.shape[-1] - last :] = 0
        return ends_and_best(pooled(scores, self.pool), 0, rows - last, last)
