"""Random eviction: the control of every rule that keeps rows of the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.parts.decoding.eviction import EqualRows
from regard.parts.decoding.kept import ends_and_best
from regard.reach import Call

from .card import Settings


class RandomEviction(Settings, EqualRows):
    """Tokens drawn at random, other ones for every layer and key head."""

    name = "RandomEviction"

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        draw: Any = torch.Generator().manual_seed(self.seed * 100_003 + call.site.index)
        # the rows of a batch draw alike, so that each gets what it gets alone
        scores = torch.rand(1, *call.k.shape[1:3], generator=draw).expand(len(call.k), -1, -1)
        return ends_and_best(scores.to(call.k.device), 0, rows, 0)
