"""Deletion: take out what a map ranks highest, and see how soon the transcript falls apart.

The better a map explains, the sooner the words go wrong, and the larger the area under the curve
of word errors.

Paper: as in `cross_attention_explanation`; the area is divided by 100, so that it is a percentage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.progress import bar

from .forced import Clip, Forced

Errors = Callable[[Tensor], list[float]]

_APART = re.compile(r"[^\w']+")


@dataclass(frozen=True)
class Deletion:
    """Deletion curves of some maps.

    Attributes:
        percent: share taken out at each point; errors: error rate there for each map, in
            percent, at most 100; scores: the area under each, 0 to 100, higher is better.
        sizes: for each map the mean share of cells at or above a threshold, over thresholds 0 to 1:
            how little a map needs.
        counted: "words" of free transcripts, or "pieces" of the forced one.
    """

    percent: list[float]
    errors: dict[str, list[float]]
    scores: dict[str, float]
    sizes: dict[str, float]
    counted: str = "words"

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation.

    >>> words_of(" Hello, the cat's MAT.")
    ['hello', 'the', "cat's", 'mat']
    """
    return [w.strip("'_") for w in _APART.split(text.lower()) if w.strip("'_")]


def word_errors(right: Sequence[str], said: Sequence[str]) -> float:
    """Word error rate in percent: substitutions, insertions and omissions over the right words.

    >>> word_errors("the cat sat".split(), "the bat sat down".split())
    66.66...
    """
    if not right:
        raise InputError("a word error rate needs at least one right word")
    costs = list(range(len(said) + 1))
    for i, word in enumerate(right, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(said, 1):
            here = min(costs[j] + 1, costs[j - 1] + 1, before + (word != other))
            before, costs[j] = costs[j], here
    return 100 * costs[-1] / len(right)


def area(percent: Sequence[float], errors: Sequence[float]) -> float:
    """Area under errors (percent, clipped at 100) over the share taken out, divided by 100.

    >>> area([0, 50, 100], [0, 100, 250])
    75.0
    """
    clipped = [min(e, 100.0) for e in errors]
    pairs = zip(percent, percent[1:], clipped, clipped[1:])
    return sum((b - a) * (x + y) / 2 for a, b, x, y in pairs) / 100


def sentence_map(found: Tensor) -> Tensor:
    """One map of a whole transcript from `[pieces, ...]`: rows standardised, scaled to 0..1, and
    averaged over the pieces; float64.
    """
    flat = found.double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    flat = flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-300)
    flat = flat - flat.amin(1, keepdim=True)
    flat = flat / flat.amax(1, keepdim=True).clamp_min(1e-300)
    return flat.mean(0).view(found.shape[1:])


def order(scores: Tensor) -> Tensor:
    """Cells `[bins, frames]` from the highest to the lowest, as places in the flattened field;
    among equals whole frames go first to last.
    """
    bins, frames = scores.shape
    turned = scores.T.flatten().sort(descending=True, stable=True).indices  # time first
    return turned % bins * frames + turned // bins


def decoded_errors(
    clip: Clip, read: Callable[[list[int]], list[str]], right: Sequence[str], limit: int
) -> Errors:
    """Word error rates of free transcripts, at most 100.

    Args:
        read: words from token ids; right: the words that count as right.
        limit: longest transcript that is decoded.

    Raises:
        InputError: no right words.
    """
    if not right:
        raise InputError("a word error rate needs at least one right word")

    def errors(fields: Tensor) -> list[float]:
        rows = clip.transcribe(clip.encode(fields), limit)
        return [min(100.0, word_errors(right, read(row))) for row in rows]

    return errors


def forced_errors(forced: Forced) -> Errors:
    """Share of the transcript's pieces that the model, made to say all before them, would not say
    next, in percent. For a cut window: there a free transcript repeats itself.
    """
    text = torch.tensor(forced.text, device=forced.clip.field.device)

    def errors(fields: Tensor) -> list[float]:
        wrong = forced.of_input(fields).argmax(-1) != text
        return [float(x) for x in 100 * wrong.double().mean(1)]

    return errors


def check_step(step: int) -> None:
    """Refuse a step, in percent, that does not lead from 0 to 100."""
    if step < 1 or 100 % step:
        raise InputError(f"step divides 100, as 5 and 10 do; {step} does not")


def deletion(
    clip: Clip,
    maps: Mapping[str, Tensor],
    errors: Errors,
    *,
    step: int = 5,
    baseline: str = "mean",
    seed: int = 0,
    batch: int = 16,
    counted: str = "words",
    progress: bool = True,
) -> Deletion:
    """Deletion curves of maps `[pieces, steps]` or `[pieces, bins, frames]`.

    Two random maps come with them: "random steps", on the grid of the first kind, and "random
    cells", on that of the second.

    Args:
        errors: what goes wrong on fields `[batch, bins, frames]`, in percent: `decoded_errors` or
            `forced_errors`.
        step: percent between two points.
        counted: what is counted, for the reader.

    Raises:
        InputError: a step that does not divide 100.
    """
    check_step(step)
    field, stride = clip.field, clip.stride
    bins, frames = field.shape
    stand_in = field.mean(1, keepdim=True) if baseline == "mean" else torch.zeros_like(field[:, :1])
    random = torch.Generator().manual_seed(seed)
    drawn = {
        "random steps": torch.rand(1, clip.steps, generator=random),
        "random cells": torch.rand(1, bins, frames, generator=random),
    }
    orders, sizes = {}, {}
    for name, found in {**maps, **drawn}.items():
        one = sentence_map(found.cpu())
        low, high = one.min(), one.max()
        sizes[name] = float(((one - low) / (high - low).clamp_min(1e-300)).mean())
        if one.dim() == 1:
            one = one.repeat_interleave(stride)[:frames].expand(bins, -1)
        orders[name] = order(one)
    percent = list(range(0, 101, step))
    # nothing and everything taken out is the same for all maps
    jobs = [("", 0), ("", 100)] + [(n, q) for n in orders for q in percent[1:-1]]
    wrong: dict[tuple[str, int], float] = {}
    with torch.inference_mode(), bar(-(-len(jobs) // batch), "deletion", progress) as tick:
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            gone = torch.zeros(len(part), bins * frames, dtype=torch.bool)
            for n, (name, q) in enumerate(part):
                first = name if name else next(iter(orders))
                gone[n, orders[first][: round(q / 100 * bins * frames)]] = True
            where = gone.view(-1, bins, frames).to(field.device)
            for job, value in zip(part, errors(torch.where(where, stand_in, field))):
                wrong[job] = value
            tick()
    curves = {
        n: [wrong["", 0], *(wrong[n, q] for q in percent[1:-1]), wrong["", 100]] for n in orders
    }
    return Deletion(
        [float(q) for q in percent],
        curves,
        {n: area(percent, c) for n, c in curves.items()},
        sizes,
        counted,
    )
