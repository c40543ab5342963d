"""Inside the mask: its soft edge, the style of latents, the shape of the object, a guessed mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import InputError
from regard.parts.diffusion.inversion import (
    Inverted,
    encode_text,
    frozen,
    predict,
    replay,
)
from regard.parts.diffusion.means import MeanMaps
from regard.reach import Session

DILATE, BLUR = 10 / 512, 25 / 512  # of the grid's side, as the paper's on 512 pixels
SHARPNESS, LEVEL = 10.0, 0.4  # of the soft shape
CELLS = 32 * 32  # tokens of the largest grid whose maps are used


def restyled(target: Tensor, source: Tensor, inside: Tensor, style: str = "pooled") -> Tensor:
    """The target `[channels, height, width]` with the source's mean and spread inside the mask.

    >>> a, b = torch.arange(8.0).view(1, 2, 4), 10 * torch.ones(1, 2, 4)
    >>> b[0, 0] = torch.tensor([0.0, 20, 0, 20])
    >>> restyled(a, b, torch.arange(2)[:, None].expand(2, 4) == 0).mean().item()
    7.75

    Raises:
        InputError: fewer than two cells inside, or all alike.
    """
    dims = (0, 1) if style == "pooled" else (1,)
    a, b = target[:, inside], source[:, inside]
    count = int(inside.sum())
    if count * (len(target) if style == "pooled" else 1) < 2:
        raise InputError(f"the mask covers {count} latent cells, and at least 2 are needed")
    spread = a.std(dims, keepdim=True)
    if bool((spread == 0).any()):
        raise InputError(
            f"the mask covers {count} latent cells that are all alike: widen it, or style=None"
        )
    new = (a - a.mean(dims, keepdim=True)) / spread * b.std(dims, keepdim=True)
    out = target.clone()
    out[:, inside] = new + b.mean(dims, keepdim=True)
    return out


def soften(inside: Tensor) -> Tensor:
    """The mask, widened by an ellipse and blurred, and 1 where it was.

    >>> soften(torch.eye(3) > 0).diagonal().tolist()
    [1.0, 1.0, 1.0]
    """
    side = max(inside.shape)
    reach, width = max(1, round(DILATE * side / 2)), max(1, round(BLUR * side))
    wide = F.max_pool2d(inside.float()[None, None], 2 * reach + 1, 1, reach)
    at = torch.arange(-width, width + 1, dtype=torch.float32, device=inside.device)
    line = torch.exp(-0.5 * (at / max(width / 2, 0.5)) ** 2)
    line = line / line.sum()
    padded = F.pad(wide, (width,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))[0, 0]
    return torch.where(inside, torch.ones_like(blurred), blurred.clamp(0, 1))


def pull(
    pipe: Any, ddim: Any, step: int, latents: Tensor, embeds: Tensor, mask: Tensor,
    words: Sequence[int],
) -> Tensor:  # fmt: skip
    """Gradient of |mask - soft shape of the words| with respect to the latents, times sigma."""
    time = ddim.timesteps[step]
    sigma = float((1 - ddim.alphas_cumprod[int(time)]).sqrt())
    moved = latents.detach().clone().requires_grad_()
    seen = MeanMaps(CELLS, keys=words)
    with torch.enable_grad(), frozen(pipe.unet), Session(pipe.unet, [seen]):
        predict(pipe, moved, time, embeds.detach())
        soft = torch.sigmoid(SHARPNESS * (_level(seen.words().mean(-1)) - LEVEL))
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
    seen = MeanMaps(CELLS, keys=words)
    embeds = encode_text(pipe, inverted.prompt).detach()
    replay(pipe, inverted.latents[-1], [embeds] * inverted.steps, list(nulls), guidance=guidance,
           handlers=[seen])  # fmt: skip
    return (_level(seen.words().mean(-1)) >= threshold).float()


def _level(one: Tensor) -> Tensor:
    """A map from 0 to 1."""
    return (one - one.min()) / (one.max() - one.min()).clamp_min(1e-9)
