"""A model that reads one text per row with a cache of its own, and how much it can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError


@dataclass
class Stream:
    """One model reading one text per row, with a cache of its own."""

    model: Any
    around: Callable[[], Any]
    cache: Any = None
    real: Tensor | None = None

    def step(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        self.real = real if self.real is None else torch.cat([self.real, real], 1)
        device = self.model.device
        where = (self.real.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        room = room_of(self.model)
        if room is not None and int(where.max()) >= room:
            raise InputError(
                f"the text outgrew the {room} positions of the model: give shorter negatives or "
                "fewer new tokens"
            )
        with self.around():
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=self.real.long().to(device),
                position_ids=where.to(device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        return out.logits[:, -1].float().log_softmax(-1).to(ids.device)


def vocabulary(model: Any) -> int:
    """Tokens that a model scores."""
    return int(model.get_output_embeddings().weight.shape[0])


def room_of(model: Any) -> int | None:
    """Positions of a model; None where there is no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
