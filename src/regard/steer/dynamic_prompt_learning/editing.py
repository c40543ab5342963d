"""Edits of a learnt picture by Prompt-to-Prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.parts.diffusion.inversion import Tick, replay
from regard.parts.diffusion.latents import decode
from regard.parts.diffusion.prompt_to_prompt import (
    PromptToPrompt,
    refined,
    swapped,
    word_columns,
)

from .learned import Learned

CROSS, SELF = 0.8, 0.4  # shares of the steps in which an edit follows the source: 40 and 20 of 50


@dataclass(frozen=True)
class Edited:
    """Source and edit as PIL images; where the edit could change, `[height, width]` of latents."""

    source: Any
    image: Any
    mask: Tensor | None = field(repr=False)


def edit(
    pipe: Any,
    learned: Learned,
    target: str,
    *,
    weights: Mapping[str, float] | None = None,
    local: tuple[str, str] | None = None,
    cross_steps: int | None = None,
    self_steps: int | None = None,
    threshold: float = 0.3,
    progress: Tick | None = None,
) -> Edited:
    """Edit by Prompt-to-Prompt: a word swap, a refinement, or other weights of words.

    A target of as many words as the source is a word swap; of more or fewer, a refinement; the
    source itself with `weights` is a re-weighting.

    Args:
        pipe: the pipeline that `learned` was made with.
        learned: from `DynamicPromptLearning.learn`.
        target: the edited caption.
        weights: words of the target -> factor of their attention, nothing renormalised.
        local: the words of source and target that may change the picture; elsewhere the latents are
            the source's. None changes them everywhere.
        cross_steps, self_steps: steps in which cross- and self-attention follow the source; 80 %
            and 40 % of all (in the paper 40 and 20 of 50).
        threshold: of the maps in `local`, as a share of their maximum.
        progress: called after each step.

    Raises:
        InputError: words that the captions do not have.
    """
    source, steps = learned.inverted.prompt, learned.inverted.steps
    same_length = len(source.split()) == len(target.split())
    columns = (swapped if same_length else refined)(pipe.tokenizer, source, target)
    columns = columns.scaled(pipe.tokenizer, target, weights or {})
    blend = None
    if local is not None:
        blend = (
            word_columns(pipe.tokenizer, source, local[0]),
            word_columns(pipe.tokenizer, target, local[1]),
        )
    control = PromptToPrompt(
        columns,
        round(CROSS * steps) if cross_steps is None else cross_steps,
        round(SELF * steps) if self_steps is None else self_steps,
        blend=blend,
        threshold=threshold,
    )
    pairs = zip(learned.embeds(pipe), learned.embeds(pipe, target))
    out = replay(
        pipe,
        learned.inverted.latents[-1],
        [torch.cat(pair) for pair in pairs],
        learned.nulls,
        guidance=learned.guidance,
        handlers=[control],
        after_step=control.after_step,
        progress=progress,
    )
    first, second = decode(pipe, out)
    return Edited(first, second, control.mask)
