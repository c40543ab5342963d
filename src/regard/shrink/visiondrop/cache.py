"""What a key-value cache holds under VisionDrop: every layer has a length of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.parts.decoding.cache import MethodLayer, Rows

NAME = "VisionDrop"


class ShortLayer(MethodLayer):
    """A layer of the cache that holds what is left of the prompt in this layer."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.rows: list[Rows] = []
        self.gap = 0  # tokens of this pass that were cut before this layer
        self.live: Tensor | None = None  # [batch, rows]; None: nothing was cut
        self.removed: Tensor | None = None  # [batch]

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.length, self.gap = self.length + self.gap, 0
        if not self.rows:
            self.rows = [Rows(keys), Rows(values)]
            return keys, values
        keys, values = (rows.append(new) for rows, new in zip(self.rows, (keys, values)))
        return keys, values

    def stores(self) -> list[Rows]:
        return self.rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.live is not None and self.removed is not None:
            at = beam_idx.to(self.live.device)
            self.live, self.removed = self.live[at], self.removed[at]

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = len(self.rows[0].data) if self.rows else 0
        self.reorder_cache(torch.arange(count).repeat_interleave(repeats))

    def reset(self) -> None:
        self.rows, self.length, self.live, self.removed = [], 0, None, None
