"""Perplexity on a long text: what a method costs in nats, token by token.

A document is `context` tokens that fill the cache, and `continuation` tokens more that are fed one
by one; each of these predicts its successor over the cache as the method keeps it. Nothing is
scored from the pass over the prompt, where methods that shorten the cache are still exact, and
nothing in blocks, since a method may act on every step of decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.parts.labels import check_model

from .frame import Batch, Values, check_room, step

TASK = "text"


def batches(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    context: int = 1024,
    continuation: int = 64,
    documents: int = 8,
    batch_size: int = 8,
) -> list[Batch]:
    """The documents of a text, spread evenly over it without overlap, in batches.

    Args:
        batch_size: documents read at once; they are equally long, so nothing is padded.

    Raises:
        InputError: a text too short for them, a model with too few positions.
    """
    check_model(model, tokenizer)
    given = {"context": context, "continuation": continuation, "documents": documents}
    for name, value in {**given, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name} is at least 1, not {value}")
    length = context + continuation + 1
    check_room(model, length)
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    start = getattr(tokenizer, "bos_token_id", None)
    head = ids[:1] if ids and start is not None and ids[0] == start else []
    body, room = ids[len(head) :], length - len(head)
    if len(body) < documents * room:
        raise InputError(
            f"the text has {len(body)} tokens, and {documents} documents of {room} need "
            f"{documents * room}: give a longer text, or ask for less"
        )
    gap = (len(body) - room) // max(documents - 1, 1)
    rows = torch.tensor([head + body[n * gap : n * gap + room] for n in range(documents)])
    return [
        _batch(
            rows[at : at + batch_size], tuple(range(at, min(at + batch_size, documents))), context
        )
        for at in range(0, documents, batch_size)
    ]


def _batch(rows: Tensor, numbers: tuple[int, ...], context: int) -> Batch:
    rest = rows[:, context:]
    return Batch(TASK, numbers, rows[:, :context], lambda model, cache: score(model, cache, rest))


def score(model: Any, cache: Any, rest: Tensor) -> list[Values]:
    """Mean negative log-likelihood, in nats, of `rest[:, 1:]` decoded over the cache.

    Args:
        rest: `[documents, tokens]`, what follows the tokens in the cache.
    """
    rest = rest.to(model.device)
    losses = []
    for at in range(rest.shape[1] - 1):
        logits = step(model, rest[:, at : at + 1], cache).double()
        losses.append(-logits.log_softmax(-1).gather(-1, rest[:, at + 1 : at + 2])[:, 0])
    return [{"nll": x} for x in torch.stack(losses).mean(0).tolist()]
