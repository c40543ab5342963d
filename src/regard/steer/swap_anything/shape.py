"""Where a word of the prompt is in the image: a mask where none is given, and scale adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import State
from regard.parts.diffusion.inversion import (
    Inverted,
    encode_text,
    frozen,
    predict,
    replay,
)
from regard.reach import Call, Handler, Session, Site
from regard.reach.denoising import columns, denoising

SHARPNESS, LEVEL = 10.0, 0.4  # of the soft shape


class WordMap(Handler):
    """The mean map of some key columns, over heads and over cross-attention of the largest grid."""

    def __init__(self, words: Sequence[int], cells: int = 32 * 32) -> None:
        self.words, self.cells = list(words), cells
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.counts: dict[tuple[int, int], int] = {}

    def sites(self, sites: list[Site]) -> list[Site]:
        return [s for s in sites if s.kind == "cross"]

    def after(self, call: Call, state: State) -> State | None:
        place = denoising(call)
        if place.grid is None or place.grid[0] * place.grid[1] > self.cells:
            return None
        rows = place.conditional if place.index is not None else None
        maps = columns(call, state, self.words, rows).mean((1, 3)).unflatten(1, place.grid)
        old = self.sums.get(place.grid)
        self.sums[place.grid] = maps if old is None else old + maps
        self.counts[place.grid] = self.counts.get(place.grid, 0) + 1
        return None

    def map(self) -> Tensor:
        """`[rows, height, width]`."""
        grid = max(self.sums, key=lambda g: g[0] * g[1])
        return self.sums[grid] / self.counts[grid]


def pull(
    pipe: Any, ddim: Any, step: int, latents: Tensor, embeds: Tensor, mask: Tensor,
    words: Sequence[int],
) -> Tensor:  # fmt: skip
    """Gradient of |mask - soft shape of the words| with respect to the latents, times sigma."""
    time = ddim.timesteps[step]
    sigma = float((1 - ddim.alphas_cumprod[int(time)]).sqrt())
    moved = latents.detach().clone().requires_grad_()
    look = WordMap(words)
    with torch.enable_grad(), frozen(pipe.unet), Session(pipe.unet, [look]):
        predict(pipe, moved, time, embeds.detach())
        soft = torch.sigmoid(SHARPNESS * (_level(look.map()[0]) - LEVEL))
        size = (soft.shape[-2], soft.shape[-1])
        wanted = F.adaptive_avg_pool2d(mask[None, None].to(soft), size)[0, 0]
        (gradient,) = torch.autograd.grad((wanted - soft).abs().sum(), moved)
    return sigma * gradient.detach()


def object_mask(
    pipe: Any, inverted: Inverted, nulls: Sequence[Tensor], words: Sequence[int],
    threshold: float = 0.5, guidance: float = 7.5,
) -> Tensor:  # fmt: skip
    """Where the source's branch looks for some words: their map over all steps, at least
    `threshold` of its range; `[height, width]`, a guess where no mask is at hand.
    """
    look = WordMap(words)
    embeds = encode_text(pipe, inverted.prompt).detach()
    replay(pipe, inverted.latents[-1], [embeds] * inverted.steps, list(nulls), guidance=guidance,
           handlers=[look])  # fmt: skip
    return (_level(look.map()[0]) >= threshold).float()


def _level(one: Tensor) -> Tensor:
    """A map from 0 to 1."""
    return (one - one.min()) / (one.max() - one.min()).clamp_min(1e-9)
