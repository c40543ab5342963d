"""What latents, the states of a denoiser and its attention are asked while they learn.

A denoiser learns colours and places soon and outlines late: an outline is a matter of a few pixels
at the border of a thing, and the error of the noise hardly feels it. Two remedies known from large
models are used here. The autoencoder's latents are read for what they show (as in VA-VAE, whose
latents are brought near those of a vision model): every place inside a thing then says which shape,
which colour and where its middle is, which can be painted like a colour. And the denoiser's states
halfway are read for the same (as in REPA). The heads are thrown away afterwards.

Small joint transformers do not learn by themselves to look at a word from where its thing lies, as
large ones do: things looked less at their own words than the ground did. `pointing` teaches it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.zoo.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES

from .captions import LENGTH, NUMBER
from .drawing import Drawn

PARTS = (len(SHAPES) + 1, len(COLORS) + 1, len(BACKGROUNDS), 3)
INSIDE = 0.3  # share of a token's square from which on it belongs to a thing
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


def pointing(
    seen: list[tuple[Tensor, Tensor]], words: Tensor, drawn: Drawn, weights: Tensor
) -> Tensor:
    """How much of what an image gives to the words of a thing comes from outside that thing.

    The loss of TokenCompose (Wang et al., 2024) for joint attention: (1 - share inside)^2 of the
    colour and the shape of every named thing, of the softmax over the tokens of the caption.

    Args:
        seen: queries and keys of joint attentions, `[scenes, heads, tokens, head_dim]` each: those
            of the image, then `LENGTH` of the text, then one blank.
        words: the caption's, `[scenes, words]`, as `captions.write` gives them.
        drawn: the scenes.
        weights: of every scene.

    >>> from .captions import write
    >>> from .drawing import sample
    >>> drawn = sample(2, generator=torch.Generator().manual_seed(0))
    >>> q = torch.zeros(2, 1, 64 + LENGTH + 1, 8)  # looks at every word from everywhere
    >>> bool(pointing([(q, q)], write(drawn), drawn, torch.ones(2)) > 0.5)
    True
    """
    shapes = torch.tensor([NUMBER[word] for word in SHAPES], device=words.device)
    named = torch.isin(words, shapes)
    rows, at = named.nonzero(as_tuple=True)
    thing = named.cumsum(1)[rows, at] - 1  # captions name things in their order
    tokens = seen[0][0].shape[2] - LENGTH - 1
    cover = drawn.masks(math.isqrt(tokens))[rows, thing].flatten(1)
    inside = (cover >= INSIDE) | (cover == cover.amax(1, keepdim=True))
    # the mark of the start, the words, the mark of the end
    real = torch.arange(LENGTH, device=words.device) < (words > 0).sum(1, keepdim=True) + 2
    total = weights.new_zeros(())
    for q, k in seen:
        q, k = q[:, :, :tokens], k[:, :, tokens : tokens + LENGTH]
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        p = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1).mean(1)
        for word in (at + 1, at):  # the shape, and the colour before it
            own = p[rows, :, word]
            share = (own * inside).sum(1) / own.sum(1).clamp_min(1e-6)
            total = total + (weights[rows] * (1 - share).square()).sum()
    return total / (2 * len(seen) * max(1, len(rows)))


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
