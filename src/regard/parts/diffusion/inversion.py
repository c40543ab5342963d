"""From a picture back to the noise that makes it: DDIM inversion and null-text inversion.

DDIM inversion (Song et al., 2020, arXiv 2010.02502) runs the sampler backwards at guidance 1. With
guidance the way back no longer meets the way there; null-text inversion (Mokady et al., 2022, arXiv
2211.09794) learns one encoding of the empty prompt for each step, so that it does.

The steps are those of diffusers' DDIM scheduler with the settings of the pipeline's own scheduler,
and each is undone exactly for the prediction at hand, be it of noise or of velocity (diffusers'
`DDIMInverseScheduler` does the same for noise, but reads a velocity at the wrong time). Samples are
not clipped, which could not be undone.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from regard.errors import InputError, ReachError
from regard.reach.call import Handler
from regard.reach.session import Session

from .latents import encode_pixels

Tick = Callable[[], None]
GUIDANCE = 7.5


@dataclass(frozen=True, eq=False)
class Inverted:
    """A picture and its way into noise.

    Attributes:
        latents: z_0 (the picture) to z_S (noise), each `[1, channels, height, width]`.
        timesteps: the S times of sampling, from noisy to clean.
        prompt: what the picture was said to show.
        steps: S.
    """

    latents: list[Tensor]
    timesteps: Tensor
    prompt: str
    steps: int


def check(pipe: Any) -> None:
    """Refuse a pipeline that is not Stable Diffusion 1 or 2 in its layout.

    Raises:
        ReachError: another denoiser, or more text encoders than one.
    """
    unet = getattr(pipe, "unet", None)
    plain = isinstance(pipe, DiffusionPipeline) and isinstance(unet, UNet2DConditionModel)
    if not plain or getattr(pipe, "text_encoder_2", None) is not None:
        raise ReachError(
            f"{type(pipe).__name__} cannot be inverted here: use a StableDiffusionPipeline "
            "(Stable Diffusion 1 or 2, or shapes-sd)"
        )


def encode_image(pipe: Any, image: Any) -> Tensor:
    """The latents of a picture, `[1, channels, height, width]`: the autoencoder's mean, scaled.

    Args:
        pipe: a `StableDiffusionPipeline`.
        image: a PIL image; its sides are multiples of the pipeline's `vae_scale_factor`.

    Raises:
        InputError: not a picture, or sides that do not fit.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> encode_image(tiny_pipeline("sd"), Image.new("RGB", (32, 32))).shape
    torch.Size([1, 4, 16, 16])
    """
    check(pipe)
    if not hasattr(image, "convert"):
        raise InputError(f"a {type(image).__name__} is no picture: give a PIL image")
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if image.width % unit or image.height % unit:
        raise InputError(
            f"the picture is {image.width}x{image.height}: both sides must be multiples of {unit} "
            "for this pipeline; resize it first"
        )
    pixels = pipe.image_processor.preprocess(image.convert("RGB"))
    return encode_pixels(pipe, pixels).to(pipe.unet.dtype)


def encode_text(pipe: Any, prompt: str) -> Tensor:
    """The encoding of one prompt, `[1, tokens, dim]`, by the pipeline's own encoder."""
    embeds = pipe.encode_prompt(prompt, pipe.unet.device, 1, False)[0]
    assert isinstance(embeds, Tensor)
    return embeds.to(pipe.unet.dtype)


def schedule(pipe: Any, steps: int) -> Any:
    """A `DDIMScheduler` with the settings of the pipeline's scheduler, set to so many steps."""
    config = pipe.scheduler.config
    if steps < 1 or steps > config.num_train_timesteps:
        raise InputError(f"steps is 1 to {config.num_train_timesteps}, not {steps}")
    spacing = config.get("timestep_spacing", "leading")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # settings that other schedulers have and DDIM has not
        ddim = DDIMScheduler.from_config(
            config,
            clip_sample=False,
            thresholding=False,
            timestep_spacing=spacing if spacing in ("leading", "trailing") else "leading",
        )
    ddim.set_timesteps(steps, device=pipe.unet.device)
    return ddim


def undo(ddim: Any, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
    """The latents from which a step with this prediction leads to `latents`.

    A DDIM step is linear in latents and prediction; its two factors are read off the scheduler.
    """
    ones, zeros = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    latents_factor = float(ddim.step(zeros, time, ones).prev_sample)
    prediction_factor = float(ddim.step(ones, time, zeros).prev_sample)
    return (latents - prediction_factor * prediction) / latents_factor


def predict(pipe: Any, latents: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
    """What the UNet says of latents `[rows, ...]` under text encodings `[rows, tokens, dim]`."""
    prediction = pipe.unet(latents, time, encoder_hidden_states=embeds, return_dict=False)[0]
    assert isinstance(prediction, Tensor)
    return prediction


def invert(
    pipe: Any,
    image: Any,
    prompt: str,
    *,
    steps: int = 50,
    progress: Tick | None = None,
) -> Inverted:
    """Run DDIM backwards at guidance 1, from a picture to its noise.

    Args:
        pipe: a `StableDiffusionPipeline`.
        image: a PIL image, or its latents `[1, channels, height, width]`.
        prompt: what the picture shows.
        steps: how many.
        progress: called after each step.

    Raises:
        InputError: a picture or a number of steps that does not fit.
        ReachError: a pipeline of another kind.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> found = invert(tiny_pipeline("sd"), Image.new("RGB", (32, 32)), "a circle", steps=3)
    >>> len(found.latents), found.timesteps.tolist()
    (4, [667, 334, 1])
    """
    check(pipe)
    latents = image if isinstance(image, Tensor) else encode_image(pipe, image)
    if latents.dim() != 4 or len(latents) != 1:
        raise InputError(f"latents are [1, channels, height, width], not {tuple(latents.shape)}")
    ddim = schedule(pipe, steps)
    latents = latents.to(pipe.unet.device)
    trajectory = [latents]
    with torch.no_grad():
        embeds = encode_text(pipe, prompt).to(latents.dtype)
        for time in ddim.timesteps.flip(0):
            latents = undo(ddim, predict(pipe, latents, time, embeds), time, latents)
            trajectory.append(latents)
            if progress is not None:
                progress()
    return Inverted(trajectory, ddim.timesteps, prompt, steps)


def fingerprint(pipe: Any, *tensors: Tensor) -> str:
    """What is kept for later was made with: digits that change with these tensors and with the
    weights at both ends of the pipeline (word embeddings, first and last convolution).
    """
    mark = hashlib.sha256()
    table = pipe.text_encoder.get_input_embeddings().weight
    for tensor in (*tensors, table, pipe.unet.conv_in.weight, pipe.unet.conv_out.weight):
        mark.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()


# -- null-text inversion --------------------------------------------------------------------------
def good_enough(step: int) -> float:
    """The error below which null-text inversion stops updating in a step, as released."""
    return 1e-5 + 2e-5 * step


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of two predictions."""
    return unconditional + guidance * (conditional - unconditional)


def fit_null(
    pipe: Any,
    ddim: Any,
    step: int,
    latents: Tensor,
    target: Tensor,
    embeds: Tensor,
    start: Tensor,
    *,
    guidance: float = GUIDANCE,
    inner_steps: int = 10,
    lr: float = 1e-2,
    stop: Callable[[int], float] | None = good_enough,
) -> tuple[Tensor, Tensor, float]:
    """One step of null-text inversion.

    Args:
        pipe: its UNet; no gradient reaches its weights.
        ddim: from `schedule`.
        step: which, from 0 at the noise.
        latents: where sampling stands, `[1, channels, height, width]`; target: where it should get.
        embeds: the prompt's encoding, `[1, tokens, dim]`; start: the empty prompt's to begin with.
        lr: at the first step; it falls to half of it over all steps, as released.
        stop: the error that ends the updates; None runs all of them.

    Returns:
        The learnt encoding, the latents after the step, and their mean squared error.
    """
    time = ddim.timesteps[step]
    rate = lr * (1 - step / (2 * len(ddim.timesteps)))
    with torch.no_grad():
        conditional = predict(pipe, latents, time, embeds)

    def reached(null: Tensor) -> Tensor:
        prediction = guided(conditional, predict(pipe, latents, time, null), guidance)
        out = ddim.step(prediction, time, latents).prev_sample
        assert isinstance(out, Tensor)
        return out

    null = start.detach().clone().requires_grad_(inner_steps > 0)
    adam = torch.optim.Adam([null], lr=rate)
    with frozen(pipe.unet), torch.enable_grad():
        for _ in range(inner_steps):
            loss = torch.nn.functional.mse_loss(reached(null), target)
            if stop is not None and loss.item() < stop(step):
                break
            (null.grad,) = torch.autograd.grad(loss, null)
            adam.step()
    null = null.detach()
    with torch.no_grad():
        after = reached(null)
    return null, after, float(torch.nn.functional.mse_loss(after, target))


def null_text(
    pipe: Any,
    inverted: Inverted,
    *,
    guidance: float = GUIDANCE,
    inner_steps: int = 10,
    lr: float = 1e-2,
    warm_start: bool = True,
    stop: Callable[[int], float] | None = good_enough,
    embeds: Tensor | Sequence[Tensor] | None = None,
    progress: Tick | None = None,
) -> list[Tensor]:
    """One encoding of the empty prompt for each step, so that guided sampling meets the inversion.

    Args:
        inverted: from `invert`.
        guidance: that of sampling.
        inner_steps: updates a step, at most; 0 leaves the empty prompt as it is.
        lr: see `fit_null`.
        warm_start: begin each step with what the last one learnt; False begins with the empty
            prompt.
        stop: error of a step (from 0) that ends its updates; None runs all of them.
        embeds: the prompt's encoding `[1, tokens, dim]`, or one for each step.
        progress: called after each step.

    Returns:
        `[1, tokens, dim]` for each step, from noisy to clean.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> found = invert(pipe, Image.new("RGB", (32, 32)), "a circle", steps=2)
    >>> [tuple(n.shape) for n in null_text(pipe, found, inner_steps=1)]
    [(1, 24, 32), (1, 24, 32)]
    """
    check(pipe)
    ddim = schedule(pipe, inverted.steps)
    latents = inverted.latents[-1]
    with torch.no_grad():
        empty = encode_text(pipe, "").to(latents.dtype)
        given = encode_text(pipe, inverted.prompt).to(latents.dtype) if embeds is None else embeds
    null, embeddings = empty, []
    for step in range(inverted.steps):
        null, latents, _ = fit_null(
            pipe,
            ddim,
            step,
            latents,
            inverted.latents[inverted.steps - step - 1],
            given if isinstance(given, Tensor) else given[step],
            null if warm_start else empty,
            guidance=guidance,
            inner_steps=inner_steps,
            lr=lr,
            stop=stop,
        )
        embeddings.append(null)
        if progress is not None:
            progress()
    return embeddings


@contextmanager
def frozen(*modules: Any) -> Iterator[None]:
    """No gradients for the weights of these modules; what asked for them asks again afterwards."""
    asking = [p for m in modules for p in m.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


# -- sampling again -------------------------------------------------------------------------------
def replay(
    pipe: Any,
    latents: Tensor,
    embeds: Sequence[Tensor],
    nulls: Sequence[Tensor],
    *,
    guidance: float = GUIDANCE,
    handlers: Sequence[Handler] = (),
    after_step: Callable[[int, Tensor], Tensor] | None = None,
    progress: Tick | None = None,
) -> Tensor:
    """Sample with an encoding of its own for each step, by the pipeline itself.

    Args:
        pipe: a `StableDiffusionPipeline`; its scheduler is DDIM for the while.
        latents: the noise, `[rows, channels, height, width]`, or one row for all.
        embeds: for each step the prompts' encodings, `[rows, tokens, dim]`.
        nulls: for each step the empty prompt's, `[1, tokens, dim]`.
        handlers: what acts on attention meanwhile.
        after_step: (step, latents) -> latents, after each step.
        progress: called after each step.

    Returns:
        The latents at the end, `[rows, channels, height, width]`.
    """
    check(pipe)
    rows, steps = len(embeds[0]), len(embeds)
    if len(nulls) != steps:
        raise InputError(f"{steps} encodings of the prompt but {len(nulls)} of the empty one")
    start = latents.expand(rows, -1, -1, -1) if len(latents) == 1 else latents
    both = guidance > 1

    def of(step: int) -> Tensor:
        null = nulls[step].expand(rows, -1, -1)
        return torch.cat([null, embeds[step]]) if both else embeds[step]

    def step_end(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if after_step is not None:
            given["latents"] = after_step(step, given["latents"])
        if step + 1 < steps:
            given["prompt_embeds"] = of(step + 1)
        if progress is not None:
            progress()
        return given

    scheduler, factor = pipe.scheduler, pipe.vae_scale_factor
    pipe.scheduler = schedule(pipe, steps)
    try:
        with torch.no_grad(), Session(pipe, handlers):
            out = pipe(
                prompt_embeds=embeds[0],
                negative_prompt_embeds=nulls[0].expand(rows, -1, -1) if both else None,
                latents=start,
                height=start.shape[-2] * factor,
                width=start.shape[-1] * factor,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
                callback_on_step_end=step_end,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            ).images
    finally:
        pipe.scheduler = scheduler
    assert isinstance(out, Tensor)
    return out
