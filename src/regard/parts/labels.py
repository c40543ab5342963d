"""Which of a few labels a causal language model gives to a prompt: the scores of label words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError


def check_model(model: Any, tokenizer: Any) -> None:
    """InputError for what is no causal language model with a tokenizer."""
    if tokenizer is None or not callable(tokenizer) or not hasattr(model, "generate"):
        raise InputError(f"{type(model).__name__} does not answer texts: name a language model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} reads its prompt in an encoder: name a causal language model"
        )


def label_tokens(tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """The token that stands for each label right after a prompt: the first of " label".

    Raises:
        InputError: fewer than two labels, or two that begin with the same token.
    """
    if len(set(labels)) < 2:
        raise InputError(f"label scoring needs at least two labels, not {sorted(set(labels))}")
    before = list(tokenizer("is", add_special_tokens=False)["input_ids"])
    ids = []
    for label in labels:
        after = list(tokenizer(f"is {label}", add_special_tokens=False)["input_ids"])
        if after[: len(before)] != before or len(after) == len(before):
            raise InputError(f"the tokenizer joins the label {label!r} to the word before it")
        ids.append(after[len(before)])
    for n, token in enumerate(ids):
        if token in ids[:n]:
            raise InputError(
                f"the labels {labels[ids.index(token)]!r} and {labels[n]!r} begin with the same "
                "token, so one position cannot tell them apart: rename one"
            )
    return torch.tensor(ids)


def batches(
    tokenizer: Any, prompts: Sequence[str], size: int, device: Any = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(places in `prompts`, model inputs) of batches of prompts of about the same length, padded on
    the left.
    """
    ids = [list(tokenizer(p)["input_ids"]) for p in prompts]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(ids[n]) for n in places)
        rows = torch.tensor([[0] * (width - len(ids[n])) + ids[n] for n in places])
        live = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in places])
        inputs = {"input_ids": rows}
        if not bool(live.all()):
            inputs["attention_mask"] = live
            inputs["position_ids"] = (live.cumsum(-1) - 1).clamp_min(0)
        yield places, {n: t.to(device) for n, t in inputs.items()}


def margins(logits: Tensor, truth: Tensor) -> Tensor:
    """Log-likelihood margin of the right label over the best wrong one, `[batch]`.

    Args:
        logits: `[batch, labels]`, of the label tokens at the last position.
        truth: `[batch]`, which label is right.

    >>> margins(torch.tensor([[2.0, 0.5], [1.0, 3.0]]), torch.tensor([0, 0]))
    tensor([ 1.5000, -2.0000])
    """
    right = logits.gather(-1, truth[:, None])[:, 0]
    wrong = logits.scatter(-1, truth[:, None], -torch.inf).amax(-1)
    return (right - wrong).float()


def truth_of(truth: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Which label each example has.

    Raises:
        InputError: no example, or a label that is not among them.
    """
    if not truth:
        raise InputError("there is no example: give at least one text with its label")
    place = {label: n for n, label in enumerate(labels)}
    for label in truth:
        if label not in place:
            raise InputError(f"an example has the label {label!r}, which is none of {list(labels)}")
    return [place[label] for label in truth]
