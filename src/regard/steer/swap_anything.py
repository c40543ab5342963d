"""SwapAnything: put another object in the place of one, and leave every other pixel as it is.

Paper: "SwapAnything: Enabling Arbitrary Object Swapping in Personalized Visual Editing", Gu et al.,
2024 (ECCV 2024), arXiv 2404.05717.

Two images are made in one batch from the inverted noise of a picture: the source, which gives the
picture back, and the target, which shows the other object. In the first steps the target takes from
the source, outside the mask, latents, self-attention outputs and maps, and cross-attention of the
words that both prompts share.

Deviations:
- The masks of the released code are not followed where they are wrong (self-attention outputs are
  swapped without a mask there, its pooling scrambles columns): this is the paper.
- Dilation and blur are shares of the latent grid; the paper's are 10 and 25 of 512 pixels.
- Scale adaptation steps along the gradient of the soft shape (reconstructed in the paper's terms:
  the hard shape has none), and is off by default.
- The picture is edited whole; cut out a crop first where the object is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import State, mass
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Session, Site
from regard.reach.denoising import columns, denoising
from regard.reach.inversion import (
    Inverted,
    encode_text,
    frozen,
    predict,
    replay,
    schedule,
)
from regard.reach.latents import decode
from regard.reach.picks import over
from regard.reach.prompt_to_prompt import Columns, of_row, refined

DILATE, BLUR = 10 / 512, 25 / 512  # of the grid's side, as the paper's on 512 pixels
SHARPNESS, LEVEL = 10.0, 0.4  # of the soft shape


@dataclass(frozen=True)
class Steps:
    """In how many first steps the target takes what from the source; 0 takes nothing.

    Attributes:
        latents, cross, maps, outputs: latents outside the mask, cross-attention of shared words,
            self-attention maps, self-attention outputs.
        ramp: steps over which the mask's inside opens up (content over time); 0 opens it at once.

    >>> Steps.paper(50)
    Steps(latents=30, cross=20, maps=25, outputs=10, ramp=30)
    """

    latents: int = 0
    cross: int = 0
    maps: int = 0
    outputs: int = 0
    ramp: int = 0

    @classmethod
    def paper(cls, steps: int) -> Steps:
        """The paper's numbers, for so many steps in all (they are for 50)."""
        return cls(*(round(n * steps / 50) for n in (30, 20, 25, 10, 30)))


@dataclass(eq=False)
class SwapAnything(Handler):
    """The swaps of attention between the two images of a batch, and of latents between steps.

    Args:
        mask: `[height, width]`, 1 where the object is, at any size.
        edit: columns of the prompts, from `refined(tokenizer, source, target)`.
        steps: see `Steps`.
        soft: widen and soften the mask of latents (content in space).
        style: give the target's latents within the mask the source's mean and spread there:
            "pooled" over all channels (the released code), "channels", or None.
        cells: self-attention of more image tokens keeps its own maps.

    Use `after_step` as that of `regard.reach.inversion.replay`. With all steps 0 both images are
    the plain ones.

    Raises:
        InputError: not two images, a mask of the wrong shape.
        ReachError: a model without cross-attention to text.
    """

    mask: Tensor
    edit: Columns
    steps: Steps
    soft: bool = True
    style: str | None = "pooled"
    cells: int = 32 * 32
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _now: int | None = field(default=None, init=False, repr=False)
    _run: int = field(default=-1, init=False, repr=False)
    _idle: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.mask = torch.as_tensor(self.mask).float()
        if self.mask.dim() != 2:
            raise InputError(f"the mask is [height, width], not {tuple(self.mask.shape)}")
        if self.style not in ("pooled", "channels", None):
            raise InputError(f'style is "pooled", "channels" or None, not {self.style!r}')

    def sites(self, sites: list[Site]) -> list[Site]:
        if not any(s.kind == "cross" for s in sites) or any(s.kind == "joint" for s in sites):
            raise ReachError(
                "SwapAnything acts on cross-attention to text, and this model has none: use a "
                "Stable Diffusion 1 or 2 pipeline"
            )
        self._now, self._run = None, -1
        return sites

    def inside(self, grid: tuple[int, ...]) -> Tensor:
        """The mask on a grid: cells of which more than half is inside, boolean `[cells]`."""
        if grid not in self._masks:
            shares = F.adaptive_avg_pool2d(self.mask[None, None], (grid[0], grid[1]))
            self._masks[grid] = shares[0, 0] > 0.5
        return self._masks[grid].flatten()

    def after(self, call: Call, state: State) -> State | None:
        place = denoising(call)
        if place.grid is None or self._idle:
            return None
        if place.run != self._run:  # a second run counts from its own beginning
            self._run, self._now = place.run, None
        # looks at the shape between steps are forwards too, so steps are counted here
        step = place.step if self._now is None else self._now
        rows = place.conditional.tolist()
        if len(rows) != 2:
            raise InputError(f"SwapAnything makes a source and a target, not {len(rows)} images")
        inside = self.inside(place.grid).to(call.q.device)
        source, target = rows
        if call.site.kind == "cross":
            if step >= self.steps.cross:
                return None
            words = self.edit.over(call, source, target)[0]
            new = torch.where(inside[:, None], state.out[target], words)
        else:
            new = state.out[target]
            if step < self.steps.maps and len(inside) <= self.cells:
                new = self._maps(call, state, rows, inside)
            if step < self.steps.outputs:
                new = torch.where(inside[:, None], new, state.out[source])
        out = state.out.clone()
        out[target] = new.to(out.dtype)
        return State(out, state.lse)

    def _maps(self, call: Call, state: State, rows: Sequence[int], inside: Tensor) -> Tensor:
        """Rows outside the mask look at keys outside it as the source does, at keys inside as the
        target does, over the target's values; exact by partial States, not renormalised.
        """
        value = call.v[rows[1]][None]
        of_source = over(of_row(call, rows[0], value), ~inside[None])
        of_target = over(of_row(call, rows[1], value), inside[None])
        mixed = torch.zeros_like(of_source.out, dtype=state.lse.dtype)
        for part, row in ((of_source, rows[0]), (of_target, rows[1])):
            whole = State(state.out[row][None], state.lse[row][None])
            mixed = mixed + mass(part, whole)[..., None] * part.out.to(mixed.dtype)
        return torch.where(inside[:, None], state.out[rows[1]].to(mixed.dtype), mixed[0])

    def after_step(self, step: int, latents: Tensor) -> Tensor:
        """The target's latents within the mask, in the source's style; the source's outside."""
        self._now = step + 1
        if step >= self.steps.latents:
            return latents
        source, target = latents
        size = latents.shape[-2:]
        hard = self.inside((int(size[0]), int(size[1]))).view(size).to(latents.device)
        if self.style is not None:
            target = restyled(target, source, hard, self.style)
        weight = soften(hard) if self.soft else hard.float()
        if self.steps.ramp:
            weight = weight * min(1.0, step / self.steps.ramp)
        weight = weight.to(latents)
        return torch.stack([source, source * (1 - weight) + target * weight])


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


@dataclass(frozen=True, eq=False)
class Swapped:
    """What a swap gives.

    Attributes:
        image: the picture with the other object; source: the source's branch, which should be the
            picture itself.
        latents: both, `[2, channels, height, width]`, the source first.
        error: mean squared difference of the source's latents from the picture's.
    """

    image: Any
    source: Any
    latents: Tensor
    error: float


def swap(
    pipe: Any,
    inverted: Inverted,
    nulls: Sequence[Tensor],
    mask: Tensor,
    target: str,
    *,
    steps: Steps | None = None,
    embeds: Tensor | None = None,
    soft: bool = True,
    style: str | None = "pooled",
    guidance: float = 7.5,
    shape: float = 0.0,
    shape_words: Sequence[int] = (),
    progress: Callable[[], None] | None = None,
) -> Swapped:
    """Swap the object under the mask for what the target prompt says.

    Args:
        pipe: a `StableDiffusionPipeline`; it comes out as it went in.
        inverted, nulls: from `regard.reach.inversion` (`invert`, `null_text`) of the picture.
        mask: `[height, width]`, 1 where the object is.
        target: the prompt of the new object; the shared words should stand as in the source's.
        steps: which swaps, and how long; the paper's when None.
        embeds: the target prompt's encoding `[1, tokens, dim]` where a concept was learnt.
        soft, style: see `SwapAnything`.
        guidance: as in null-text inversion.
        shape: strength of scale adaptation: the target's latents step towards a shape of the
            object's word (`shape_words`, key columns of the target) like the mask.

    Raises:
        InputError: a mask that covers nothing or too little.
    """
    count = inverted.steps
    handler = SwapAnything(
        mask, refined(pipe.tokenizer, inverted.prompt, target), steps or Steps.paper(count),
        soft=soft, style=style,
    )  # fmt: skip
    if not bool((handler.mask > 0.5).any()):
        raise InputError("the mask is empty, so nothing would be swapped: mark the object with 1")
    with torch.no_grad():
        source = encode_text(pipe, inverted.prompt)
        both = torch.cat([source, encode_text(pipe, target) if embeds is None else embeds])
    ddim = schedule(pipe, count)

    def after_step(step: int, latents: Tensor) -> Tensor:
        if shape and step < handler.steps.latents and step + 1 < count:
            handler._idle = True
            try:
                pull = _pull(pipe, ddim, step + 1, latents[1:], both[1:], handler.mask, shape_words)
            finally:
                handler._idle = False
            latents = torch.cat([latents[:1], latents[1:] - shape * pull])
        return handler.after_step(step, latents)

    latents = replay(
        pipe, inverted.latents[-1], [both] * count, list(nulls), guidance=guidance,
        handlers=[handler], after_step=after_step, progress=progress,
    )  # fmt: skip
    first, second = decode(pipe, latents)
    error = float(F.mse_loss(latents[:1], inverted.latents[0]))
    return Swapped(second, first, latents, error)


class WordMap(Handler):
    """The mean map of some key columns, over heads and over cross-attention of the largest grid."""

    def __init__(self, words: Sequence[int], cells: int = 32 * 32) -> None:
        self.words, self.cells = list(words), cells
        self.sums: dict[tuple[int, ...], Tensor] = {}
        self.counts: dict[tuple[int, ...], int] = {}

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


def _pull(
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
        found = look.map()[0]
        soft = torch.sigmoid(SHARPNESS * (_level(found) - LEVEL))
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


def _level(found: Tensor) -> Tensor:
    """A map from 0 to 1."""
    return (found - found.min()) / (found.max() - found.min()).clamp_min(1e-9)


__all__ = [
    "Steps",
    "SwapAnything",
    "Swapped",
    "object_mask",
    "restyled",
    "soften",
    "swap",
]
