"""One forward pass of a joint-attention denoiser over a real image, noised to one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, ReachError

from .latents import encode_pixels


def size_of(pipe: Any, image: Any) -> tuple[int, int]:
    """Height and width, in pixels, to which the image is brought: its own, rounded to whole tokens.

    Raises:
        ReachError: a pipeline without joint attention to text (Stable Diffusion 3, Flux).
        InputError: an image smaller than one token.
    """
    transformer: Any = getattr(pipe, "transformer", None)
    kind = type(transformer).__name__
    if kind not in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        raise ReachError(
            f"{type(pipe).__name__} has no joint attention of an image to text: use a Stable "
            "Diffusion 3 or Flux pipeline"
        )
    patch = 2 if kind.startswith("Flux") else transformer.config.patch_size
    unit = pipe.vae_scale_factor * patch
    height, width = (max(unit, side // unit * unit) for side in (image.height, image.width))
    if min(image.height, image.width) < unit:
        raise InputError(f"an image has at least {unit} pixels a side, not {image.size}")
    return height, width


def denoise_once(
    pipe: Any,
    image: Any,
    text: str,
    *,
    pooled_text: str | None = None,
    noise: float = 0.5,
    draws: int = 1,
    seed: int = 0,
) -> None:
    """Encode a PIL image, noise it, and let the denoiser read it once with the text beside it.

    For what an open session sees on the way; the prediction itself is not kept.

    Args:
        pooled_text: the text behind the pooled vector, where it is to differ from the text keys.
        noise: time t of the rectified flow, x_t = (1 - t) x + t n.
        draws: noises, one row of the batch each.
        seed: of the first noise; draw `n` has the seed `seed + n`, alone and in a batch.

    Raises:
        InputError, ReachError: see `size_of`.
    """
    height, width = size_of(pipe, image)
    transformer = pipe.transformer
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(image.convert("RGB"), height, width)
        clean = encode_pixels(pipe, pixels)
        eps = torch.cat([_noise(clean, seed + n) for n in range(draws)])
        mixed = ((1 - noise) * clean + noise * eps).to(transformer.dtype)
        embeds, pooled = _encode(pipe, [text] * draws)
        if pooled_text is not None and pooled_text != text:
            pooled = _encode(pipe, [pooled_text] * draws)[1]
        if type(transformer).__name__.startswith("Flux"):
            _flux(pipe, mixed, noise, embeds, pooled)
        else:
            transformer(
                hidden_states=mixed,
                timestep=mixed.new_full((draws,), 1000 * noise),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            )


def _noise(like: Tensor, seed: int) -> Tensor:
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(like)


def _encode(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Text keys and pooled vector; asked of the pipeline, so that an open session hears of it."""
    if type(pipe.transformer).__name__.startswith("Flux"):
        room = min(512, pipe.tokenizer_2.model_max_length)
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=texts, prompt_2=None, max_sequence_length=room
        )
        return embeds, pooled
    third = pipe.tokenizer_3
    room = 256 if third is None else min(256, third.model_max_length)
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt=texts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=room,
    )
    return embeds, pooled


def _flux(pipe: Any, mixed: Tensor, noise: float, embeds: Tensor, pooled: Tensor) -> None:
    rows, channels, height, width = mixed.shape
    guidance = None
    if pipe.transformer.config.guidance_embeds:
        guidance = mixed.new_full((rows,), 3.5)  # the pipeline's own
    pipe.transformer(
        hidden_states=pipe._pack_latents(mixed, rows, channels, height, width),
        timestep=mixed.new_full((rows,), noise),
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=mixed.new_zeros(embeds.shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(
            rows, height // 2, width // 2, mixed.device, mixed.dtype
        ),
    )
