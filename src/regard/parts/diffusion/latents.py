"""Between pixels and latents: the autoencoder of a diffusion pipeline, with its shift and scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode_pixels(pipe: Any, pixels: Tensor) -> Tensor:
    """The latents of preprocessed pixels `[images, 3, height, width]`: the mean of the pipeline's
    autoencoder, shifted and scaled; float32.
    """
    with torch.no_grad():
        spread = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    shift, scale = _shift(pipe)
    latents: Tensor = (spread.mode().float() - shift) * scale
    return latents


def decode(pipe: Any, latents: Tensor) -> list[Any]:
    """The pictures of latents `[images, channels, height, width]`, as PIL images."""
    shift, scale = _shift(pipe)
    with torch.no_grad():
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / scale + shift).sample
    return list(pipe.image_processor.postprocess(pixels.detach(), output_type="pil"))


def _shift(pipe: Any) -> tuple[float, float]:
    config = pipe.vae.config
    return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)
