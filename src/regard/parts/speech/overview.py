"""What a page about one clip shows, as a plain dictionary of numbers, lists and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cross_attention import CrossAttention

COLUMNS = 600  # of the large map, at most
SMALL = 72  # columns of the map of one head
HEADS = 24  # small maps, at most
BINS = 40  # rows of the spectrogram


def overview(
    seen: CrossAttention,
    *,
    spectrogram: Tensor | None = None,
    theirs: Sequence[float] | None = None,
    truth: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that the page, the terminal and the JSON of a clip show.

    Args:
        seen: what was measured; small maps of heads need `maps=True`.
        spectrogram: the model's input over the sound, `[mel bins, frames]`.
        theirs: start of every token as transformers' own time stamps say, in seconds.
        truth: `words` and `times` of a shipped clip, where its synthesiser told them.
        meta: model, clip, notes, seconds and what else the page states.
    """
    step = seen.seconds_per_frame
    # A word looks where its rows, scaled to the frames with sound, have their mass.
    maps = {"all heads and layers": seen.word_map()}
    if seen.aligned.shape[0]:
        maps["alignment heads"] = seen.word_map(seen.aligned[:, : len(seen.tokens)].mean(0))
    for layer, rows in seen.layers.items():
        maps[f"layer {layer}"] = seen.word_map(rows)
    words = _words(seen, theirs, truth)
    page: dict[str, Any] = {
        "kind": "speech",
        "meta": {**(meta or {}), "heads": seen.entropy.shape[1], "layers": len(seen.layers)},
        "transcript": seen.text,
        "tokens": seen.pieces,
        "words": words,
        "frames": seen.frames,
        "all_frames": seen.all_frames,
        "seconds_per_frame": step,
        "dropped": float(seen.dropped.mean()),
        "fit": seen.fit,
        "maps": {name: _numbers(_coarse(rows, COLUMNS)) for name, rows in maps.items()},
        "heads": {
            "monotone": _numbers(seen.monotone),
            "entropy": _numbers(seen.entropy.mean(-1)),
            "dropped": _numbers(seen.dropped.mean(-1)),
            "layers": list(seen.layers),
            "alignment": [list(pair) for pair in seen.alignment_heads],
        },
        "head_maps": _head_maps(seen),
        "errors": _errors(words),
    }
    if spectrogram is not None:
        page["spectrogram"] = _numbers(_coarse(_bins(spectrogram.float().cpu()), COLUMNS))
    return page


def _words(
    seen: CrossAttention, theirs: Sequence[float] | None, truth: dict[str, Any] | None
) -> list[dict[str, Any]]:
    rows = seen.word_map()
    step = seen.seconds_per_frame
    held = rows.sum(-1).clamp_min(1e-12)
    places = torch.arange(rows.shape[-1], dtype=torch.float32)
    centre = (rows @ places) / held
    around = (places - centre[:, None]).square()
    spread = ((rows * around).sum(-1) / held).sqrt()
    known = _known(seen, truth)
    entries = []
    for i, word in enumerate(seen.words):
        entry: dict[str, Any] = {
            "text": word.text,
            "first": word.first,
            "last": word.last,
            "start": _finite(word.start),
            "end": _finite(word.end),
            "peak": None if step is None else float(rows[i].argmax() + 0.5) * step,
            "centre": None if step is None else float(centre[i] + 0.5) * step,
            "spread": None if step is None else float(spread[i]) * step,
            "dropped": float(seen.dropped[:, :, word.first : word.last].mean()),
        }
        if theirs is not None and word.first < len(theirs):
            entry["theirs"] = float(theirs[word.first])
        if known is not None:
            entry["true_start"], entry["true_end"] = map(float, known[i])
        entries.append(entry)
    return entries


def _known(seen: CrossAttention, truth: dict[str, Any] | None) -> Any:
    """The true times, where as many words were heard as were said."""
    times = (truth or {}).get("times")
    return times if times and len(times) == len(seen.words) else None


def _errors(words: list[dict[str, Any]]) -> dict[str, float]:
    """Mean distance of word starts from the truth in seconds, ours and transformers'."""
    known = [w for w in words if w.get("true_start") is not None and w["start"] is not None]
    if not known:
        return {}
    errors = {"start": sum(abs(w["start"] - w["true_start"]) for w in known) / len(known)}
    if all("theirs" in w for w in known):
        errors["theirs"] = sum(abs(w["theirs"] - w["true_start"]) for w in known) / len(known)
    return errors


def _head_maps(seen: CrossAttention) -> list[dict[str, Any]]:
    """Small maps of single heads: those that follow the sound best first."""
    if not seen.maps:
        return []
    order = seen.monotone.flatten().argsort(descending=True).tolist()
    heads = seen.monotone.shape[1]
    named = set(seen.alignment_heads)
    maps = []
    for flat in order[:HEADS]:
        row, head = divmod(flat, heads)
        layer = list(seen.layers)[row]
        maps.append(
            {
                "layer": layer,
                "head": head,
                "alignment": (layer, head) in named,
                "monotone": float(seen.monotone[row, head]),
                "cells": _numbers(_coarse(seen.word_map(seen.maps[layer][head]), SMALL)),
            }
        )
    return maps


def _coarse(rows: Tensor, columns: int) -> Tensor:
    """The rows with neighbouring columns averaged, so that there are at most so many."""
    wide = rows.shape[-1]
    if wide <= columns:
        return rows
    size = math.ceil(wide / columns)
    flat = rows.reshape(1, -1, wide)
    pooled = torch.nn.functional.avg_pool1d(flat, size, ceil_mode=True, count_include_pad=False)
    return pooled.reshape(*rows.shape[:-1], -1)


def _bins(spectrogram: Tensor) -> Tensor:
    size = max(1, spectrogram.shape[0] // BINS)
    return torch.nn.functional.avg_pool1d(spectrogram.T[None], size)[0].T


def _numbers(values: Tensor) -> Any:
    return [
        _numbers(v) if v.dim() else (float(f"{float(v):.4g}") if math.isfinite(v) else None)
        for v in values
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
