"""What latents, the states of a denoiser and those of a caption are asked while they learn.

A denoiser learns colours and places soon and outlines late: an outline is a matter of a few pixels
at the border of a thing, and the error of the noise hardly feels it. Two remedies known from large
models are used here. The autoencoder's latents are read for what they show (as in VA-VAE, whose
latents are brought near those of a vision model): every place inside a thing then says which shape,
which colour and where its middle is, which can be painted like a colour. And the denoiser's states
halfway are read for the same (as in REPA). Where things stand is felt even less, for it is settled
within the first few steps of an image: so the caption's states can be made to say it too. That has
its price: words that tell of both things are looked at for either, and the maps of words lie on
neither; so only `shapes-dit` is taught in this way. The heads are thrown away afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.zoo.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES

from .captions import NUMBER
from .drawing import Drawn

PARTS = (len(SHAPES) + 1, len(COLORS) + 1, len(BACKGROUNDS), 3)
CELLS = 4  # along each side, in which a caption's states place things
SAID = ("left", "right", "above", "below", "top", "bottom", *SHAPES)  # words that are asked
MIDDLE = sum(map(sum, SIZES.values())) / 4  # radius, by which others are measured


class Reading(nn.Module):
    """Heads that read `[scenes, channels, height, width]` for what every place shows.

    Args:
        channels: of the states.
        hidden: units of the layer between; none for linear heads.
    """

    def __init__(self, channels: int, hidden: int = 96) -> None:
        super().__init__()
        self.heads = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, sum(PARTS), 1)
        )

    def loss(self, states: Tensor, drawn: Drawn) -> Tensor:
        """Cross-entropies of shape, colour and ground, and how far off centre and radius are.

        >>> from .drawing import sample
        >>> drawn = sample(2, generator=torch.Generator().manual_seed(0))
        >>> bool(Reading(8).loss(torch.zeros(2, 8, 16, 16), drawn) > 0)
        True
        """
        told = self.heads(states).float().split(PARTS, 1)
        inside, shape, color, middle = labels(drawn, states.shape[-1])
        ground = drawn.background[:, None, None].expand_as(shape)
        off = F.smooth_l1_loss(told[3], middle, reduction="none").mean(1)
        loss: Tensor = F.cross_entropy(told[0], shape) + F.cross_entropy(told[1], color)
        loss = loss + 0.5 * F.cross_entropy(told[2], ground)
        return loss + (off * inside).sum() / inside.sum().clamp_min(1)


class Telling(nn.Module):
    """Heads that read the states of a caption for its first two things: where, and what they are.

    Args:
        width: of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = 2 * [CELLS, CELLS, len(COLORS), len(SHAPES)]
        self.head = nn.Linear(width, sum(self.parts))

    def loss(self, states: Tensor, words: Tensor, drawn: Drawn) -> Tensor:
        """Cross-entropies of cells and kinds, asked at each shape, relation and place.

        Args:
            states: `[scenes, tokens, width]`, from the token before the first word on.
            words: the caption's, `[scenes, words]`, as `captions.write` gives them.
            drawn: the scenes.

        >>> from .captions import write
        >>> from .drawing import sample
        >>> drawn = sample(2, things=(1, 2), generator=torch.Generator().manual_seed(0))
        >>> bool(Telling(8).loss(torch.zeros(2, 32, 8), write(drawn), drawn) > 0)
        True
        """
        asked = torch.tensor([NUMBER[word] for word in SAID], device=words.device)
        rows, at = torch.isin(words[:, : states.shape[1] - 1], asked).nonzero(as_tuple=True)
        told = self.head(states[rows, at + 1]).float().split(self.parts, -1)
        every = torch.stack([*drawn.cells(CELLS), drawn.color, drawn.shape], -1)
        every = torch.where(drawn.there[..., None], every, -100)[:, :2].flatten(1)[rows]
        total = told[0].new_zeros(())
        for logits, wanted in zip(told, every.T):
            known = (wanted >= 0).sum().clamp_min(1)
            total = total + F.cross_entropy(logits, wanted, reduction="sum") / known
        return total


def keep(module: nn.Module, states: dict[str, Tensor], name: str, part: int = 0) -> Any:
    """Keep what a module gives last, or that part of it, as `states[name]`; returns the hook."""

    def hook(module: Any, args: Any, out: Any) -> None:
        states[name] = out[part] if isinstance(out, tuple) else out

    return module.register_forward_hook(hook)


def labels(drawn: Drawn, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `side` x `side` places show: whether they lie in a thing's circle, 1 + its shape and 1 +
    its colour (0 outside) `[scenes, side, side]`, and its centre and radius as seen from there
    `[scenes, 3, side, side]`. The hole of a ring belongs to it.
    """
    at = (torch.arange(side, device=drawn.x.device) + 0.5) / side
    many = (*drawn.x.shape, side, side)
    right = (at - drawn.x[..., None, None]).expand(many)
    down = (at[:, None] - drawn.y[..., None, None]).expand(many)
    near = torch.hypot(right, down) < drawn.radius[..., None, None]
    near &= drawn.there[..., None, None]
    inside, which = near.any(1), near.int().argmax(1)

    def of(values: Tensor) -> Tensor:
        return values.gather(1, which.flatten(1)).view(which.shape)

    radius = of(drawn.radius)
    right, down = (v.gather(1, which[:, None])[:, 0] / radius for v in (right, down))
    middle = torch.stack([right, down, 10 * (radius - MIDDLE)], 1)
    shape, color = (torch.where(inside, 1 + of(v), 0) for v in (drawn.shape, drawn.color))
    return inside, shape, color, middle
