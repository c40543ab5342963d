"""Tiny vision-language models with massive activations planted in them, as trained ones have."""

from __future__ import annotations

from typing import Any

import torch

from regard.zoo.tiny_vlm import tiny_vlm

DIMS = (5, 9)
SINK_WORD = 11
TAU = 4.5


def planted(family: str, layers: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """One word and some patches carry a massive activation through all layers."""
    model = tiny_vlm(family, layers=layers)
    body = model.get_decoder()
    with torch.no_grad():
        body.embed_tokens.weight[SINK_WORD, DIMS[0]] = 60.0
        last = (
            model.model.visual.merger
            if family.startswith("qwen")
            else model.model.multi_modal_projector
        )
        names = [n for n, m in last.named_modules() if isinstance(m, torch.nn.Linear)]
        last.get_submodule(names[-1]).weight[DIMS[1]] *= 12.0
    return model.to(dtype)


def with_sink_words(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first word of every row is the planted one."""
    first = inputs["attention_mask"].int().argmax(-1)
    inputs["input_ids"][torch.arange(len(first)), first] = SINK_WORD
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def alone(family: str, inputs: dict[str, Any], row: int, images: list[int]) -> dict[str, Any]:
    """One row of a left-padded batch by itself; `images` are the images of the rows."""
    keep = inputs["attention_mask"][row].bool()
    start = sum(images[:row])
    own = slice(start, start + images[row])
    made = {}
    for name, x in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
            made[name] = x[row : row + 1, keep]
        elif images[row] == 0:
            continue
        elif name == "pixel_values" and family.startswith("qwen"):
            each = inputs["image_grid_thw"].prod(-1).tolist()
            made[name] = x.split(each)[start : start + images[row]]
            made[name] = torch.cat(made[name])
        else:
            made[name] = x[own]
    return made
