"""Positions that are not rotary, and who sees whom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.core import Mask

BUCKETS, FAR = 32, 128


class Places(nn.Module):
    """What a kind of positions adds to the embeddings, or to the scores by distance."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.kind: str = config.positions
        self.width, self.heads = config.hidden_size, config.num_attention_heads
        if self.kind == "learned":
            self.embedding = nn.Embedding(config.max_position_embeddings, self.width)
        if self.kind == "relative":
            self.embedding = nn.Embedding(BUCKETS, self.heads)

    def added(self, position_ids: Tensor) -> Tensor | None:
        """`[batch or 1, tokens, width]`, added to the embeddings."""
        if self.kind == "learned":
            longest = self.embedding.num_embeddings
            last = int(position_ids.max())
            if last >= longest:
                from regard.errors import InputError

                raise InputError(
                    f"position {last} lies beyond the learned positions of this model, which end "
                    f"at {longest - 1}: give a shorter text"
                )
            added: Tensor = self.embedding(position_ids)
            return added
        if self.kind == "absolute":
            return sinusoids(position_ids, self.width)
        return None

    def table(self, reach: int) -> Tensor | None:
        """Bias of the score for every distance below `reach`, `[heads, reach]`."""
        if self.kind == "relative":
            away = torch.arange(reach, device=self.embedding.weight.device)
            biases: Tensor = self.embedding(buckets(away))
            return biases.T
        if self.kind == "alibi":
            device = next(iter(self.parameters()), torch.empty(0)).device
            return -slopes(self.heads, device)[:, None] * torch.arange(reach, device=device)
        return None


def module(config: Any) -> Places | None:
    """None for kinds that neither add to embeddings nor to scores."""
    return None if config.positions in ("rope", "nope") else Places(config)


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions over a geometric range of wavelengths."""
    half = (width + 1) // 2
    rates = 10_000.0 ** (-torch.arange(half, device=position_ids.device) / half)
    angles = position_ids[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]


def slopes(heads: int, device: Any = None) -> Tensor:
    """2^(-8 h / heads) for h = 1, 2, ...: how fast the bias of ALiBi falls."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)


def buckets(away: Tensor) -> Tensor:
    """T5's buckets of a distance back: each to itself up to 16, then by logarithm up to 128."""
    exact = BUCKETS // 2
    scaled = torch.log(away.clamp_min(1) / exact) / torch.log(torch.tensor(FAR / exact))
    far = exact + (scaled * (BUCKETS - exact)).long()
    return torch.where(away < exact, away, far.clamp(max=BUCKETS - 1))


def starts(live: Tensor | None) -> Tensor | None:
    """Column of the first token of every row; None where all rows begin at 0."""
    return None if live is None else live.long().argmax(-1)


def pairs(config: Any, live: Tensor | None) -> Mask:
    """Who sees whom: causal, a visible prefix, a window, no padding."""
    mask = Mask.causal()
    if config.prefix:
        first, size = starts(live), config.prefix
        if first is None:
            mask = mask | Mask.prefix(size)
        else:
            column = first

            def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return j < column[b] + size

            mask = mask | Mask.predicate(visible, batch=len(first))
    if config.window is not None:
        mask = mask & Mask.band(config.window - 1, None)
    return mask if live is None else mask & Mask.padding(live)


def rules(config: Any, live: Tensor | None) -> dict[str, Any]:
    """The same for transformers' mask factory, which knows of causality and padding itself."""
    given: dict[str, Any] = {}
    if config.prefix:
        first, size = starts(live), config.prefix

        def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
            return k < (0 if first is None else first[b]) + size

        given["or_mask_function"] = visible
    if config.window is not None:
        width = config.window

        def near(b: Any, h: Any, q: Any, k: Any) -> Any:
            return k > q - width

        given["and_mask_function"] = near
    return given
