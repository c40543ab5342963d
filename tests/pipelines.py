"""Images of the tiny diffusion pipelines, under handlers."""

from __future__ import annotations

from typing import Any

import torch

import regard
from regard.reach import Handler


def run(pipe: Any, *handlers: Handler, prompt: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Images `[batch, height, width, 3]` of one seed an element, whatever the batch."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    count *= kwargs.get("num_images_per_prompt", 1)
    noise = [torch.Generator().manual_seed(seed + n) for n in range(count)]
    with regard.apply(pipe, *handlers):
        return pipe(prompt, generator=noise, **settings(pipe, **kwargs)).images


def settings(pipe: Any, **kwargs: Any) -> dict[str, Any]:
    """Few steps and small images, unless told otherwise."""
    kwargs = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"} | kwargs
    if not hasattr(pipe, "unet"):
        kwargs.setdefault("max_sequence_length", 24)
    return kwargs
