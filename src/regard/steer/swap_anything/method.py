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
from regard.parts.decoding.picks import over
from regard.parts.diffusion.inversion import Inverted, encode_text, replay, schedule
from regard.parts.diffusion.latents import decode
from regard.parts.diffusion.prompt_to_prompt import Columns, of_row, refined
from regard.reach import Call, Handler, Site
from regard.reach.denoising import denoising

from .card import Settings
from .shape import pull, restyled, soften


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

    @classmethod
    def shares(cls, shares: Sequence[float], steps: int) -> Steps:
        """Shares of so many steps, in the order of the attributes."""
        return cls(*(round(share * steps) for share in shares))


@dataclass(eq=False)
class SwapAnything(Handler):
    """The swaps of attention between the two images of a batch, and of latents between steps.

    Args:
        mask: `[height, width]`, 1 where the object is, at any size.
        edit: columns of the prompts, from `refined(tokenizer, source, target)`.
        steps: see `Steps`.
        soft, style: see `Settings`.
        cells: self-attention of more image tokens keeps its own maps.

    Use `after_step` as that of `parts.diffusion.inversion.replay`; `swap` does. With all steps 0
    both images are the plain ones.

    >>> import regard
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> edit = refined(tiny_pipeline("sd").tokenizer, "a red circle", "a red star")
    >>> regard.SwapAnything(torch.eye(4), edit, Steps(cross=1)).inside((2, 2)).tolist()
    [False, False, False, False]

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
        Settings(soft=self.soft, style=self.style)  # refuses another style

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
        if self.style not in (None, "none"):
            target = restyled(target, source, hard, self.style)
        weight = soften(hard) if self.soft else hard.float()
        if self.steps.ramp:
            weight = weight * min(1.0, step / self.steps.ramp)
        weight = weight.to(latents)
        return torch.stack([source, source * (1 - weight) + target * weight])


@dataclass(frozen=True, eq=False)
class Swapped:
    """What a swap gives.

    Attributes:
        image: the picture with the other object; source: the source's branch, which should be the
            picture itself.
        latents: both, `[2, channels, height, width]`, the source first.
        error: mean squared difference of the source's latents from the picture's.
        inside: latent cells under the mask, boolean `[height, width]`.
    """

    image: Any
    source: Any
    latents: Tensor
    error: float
    inside: Tensor

    def report(self) -> dict[str, Any]:
        """Plain data: latent cells under the mask, of how many, and the inversion's error."""
        cells = {"cells": int(self.inside.sum()), "of": self.inside.numel()}
        return {**cells, "error": self.error}


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
        inverted, nulls: from `parts.diffusion.inversion` (`invert`, `null_text`) of the picture.
        mask: `[height, width]`, 1 where the object is.
        target: the prompt of the new object; the shared words should stand as in the source's.
        steps: which swaps, and how long; the paper's when None.
        embeds: the target prompt's encoding `[1, tokens, dim]` where a concept was learnt.
        soft, style: see `Settings`.
        guidance: as in null-text inversion.
        shape: strength of scale adaptation: the target's latents step towards a shape of the
            object's word (`shape_words`, key columns of the target) like the mask.

    >>> import regard
    >>> from PIL import Image
    >>> from regard.parts.diffusion.inversion import invert, null_text
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, picture = tiny_pipeline("sd"), Image.new("RGB", (32, 32), "red")
    >>> inverted = invert(pipe, picture, "a red circle", steps=2)
    >>> nulls = null_text(pipe, inverted, inner_steps=1)
    >>> regard.swap(pipe, inverted, nulls, torch.ones(32, 32), "a red star").report()["cells"]
    256

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
                toward = pull(
                    pipe, ddim, step + 1, latents[1:], both[1:], handler.mask, shape_words
                )
            finally:
                handler._idle = False
            latents = torch.cat([latents[:1], latents[1:] - shape * toward])
        return handler.after_step(step, latents)

    latents = replay(
        pipe, inverted.latents[-1], [both] * count, list(nulls), guidance=guidance,
        handlers=[handler], after_step=after_step, progress=progress,
    )  # fmt: skip
    first, second = decode(pipe, latents)
    error = float(F.mse_loss(latents[:1], inverted.latents[0]))
    size = (int(latents.shape[-2]), int(latents.shape[-1]))
    return Swapped(second, first, latents, error, handler.inside(size).view(size))
