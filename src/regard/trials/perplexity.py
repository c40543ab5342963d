"""Perplexity on a long text: what a method costs in nats, token by token.

A chunk is `context` tokens that fill the cache, and `tokens` more that are fed one by one; each of
these predicts its successor over the cache as the method keeps it. Nothing is scored from the pass
over the prompt, where methods that shorten the cache are still exact, and nothing in blocks, since
a method may act on every step of decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

from .judge import Sample, Values, check_room, held, prefill


def samples(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    context: int = 1024,
    tokens: int = 96,
    chunks: int = 6,
) -> list[Sample]:
    """The chunks of a text, spread evenly over it; they do not overlap.

    Raises:
        InputError: a text too short for them, a model with too few positions.
    """
    for name, value in (("context", context), ("tokens", tokens), ("chunks", chunks)):
        if value < 1:
            raise InputError(f"{name} is at least 1, not {value}")
    length = context + tokens + 1
    check_room(model, length)
    tokenizer.model_max_length = int(1e30)  # chunks are cut here; its warning would be wrong
    ids = torch.as_tensor(tokenizer(text)["input_ids"])
    if len(ids) < chunks * length:
        raise InputError(
            f"the text has {len(ids)} tokens, and {chunks} chunks of {length} need "
            f"{chunks * length}: give a longer text, or ask for less"
        )
    gap = (len(ids) - length) // max(chunks - 1, 1)
    starts = [n * gap for n in range(chunks)]
    return [_sample(n, ids[at : at + length][None], context) for n, at in enumerate(starts)]


def _sample(number: int, ids: Tensor, context: int) -> Sample:
    return Sample("perplexity", number, lambda model: score(model, ids, context))


def score(model: Any, ids: Tensor, context: int) -> Values:
    """Mean negative log-likelihood, in nats, of `ids[0, context + 1:]` decoded over the cache."""
    ids = ids.to(model.device)
    cache = prefill(model, ids[:, :context])
    values: Values = {"held": held(cache)}
    losses = []
    for at in range(context, ids.shape[1] - 1):
        logits = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        losses.append(-logits[0, -1].double().log_softmax(-1)[ids[0, at + 1]])
    return values | {"nll": float(torch.stack(losses).mean())}
