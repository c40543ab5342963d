"""What a reader gets of an explanation: plain numbers for the page, the terminal and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .deletion import sentence_map
from .maps import pearson, plain, pool
from .method import Explanation
from .saliency import gradients


def scaled(found: Tensor) -> Tensor:
    """Each row of a map `[pieces, ...]` from 0 to 1; constant rows become zeros.

    >>> scaled(torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0]]))
    tensor([[0.0000, 1.0000, 0.5000],
            [0.0000, 0.0000, 0.0000]])
    """
    flat = found.float().flatten(1)
    flat = flat - flat.amin(1, keepdim=True)
    top = flat.amax(1, keepdim=True)
    return torch.where(top > 0, flat / top.clamp_min(1e-30), 0.0).view(found.shape)


def references(
    made: Explanation,
    methods: Sequence[str] = ("gradient_x_input", "integrated_gradients"),
    **how: Any,
) -> dict[str, dict[str, float | None]]:
    """Gradient-based saliency as a cross-check: its correlation with attention (mean over all
    heads) and with SPES, both on attention's grid; None where a map is constant.
    """
    found = {}
    clip, attention = made.forced.clip, made.cross.mean((0, 1))
    for method in methods:
        kept = gradients(made.forced, method, baseline=made.settings["baseline"], **how)
        low = pool(kept, clip.stride, clip.steps)
        found[method] = {
            "attention": plain(pearson(attention, low)),
            "saliency": plain(pearson(made.pooled, low)),
        }
    return found


def overview(
    made: Explanation, *, references: Any = None, meta: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything the page draws, rounded, as plain JSON values.

    `maps` are `[pieces, steps]`, each row from 0 to 1; `cells` the saliency of the spectrogram, of
    the whole transcript and of every piece, `[bins, frames]`.
    """
    top = made.states.map.amax(1)
    maps = {
        "attention": made.cross.mean((0, 1)),
        "saliency of the sound": made.pooled,
        "saliency of the encoder’s output": top,
    }
    cells = {"the whole transcript": scaled(sentence_map(made.input.map)[None])[0]}
    for n, piece in enumerate(made.pieces):
        cells[f"{n + 1}. {piece.strip() or '␣'}"] = scaled(made.input.map[n : n + 1])[0]
    return {
        **made.as_dict(),
        "seconds_per_step": made.seconds,
        "spectrogram": _rows(made.forced.clip.field.float().cpu()),
        "maps": {name: _rows(scaled(x)) for name, x in maps.items()},
        "cells": {name: _rows(x) for name, x in cells.items()},
        "scores": [round(float(x), 4) for x in made.input.scores],
        "references": references,
        "meta": meta or {},
    }


def _rows(x: Tensor) -> list[list[float]]:
    return [[round(float(v), 3) for v in row] for row in x]
