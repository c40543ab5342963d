"""Label scoring as a trial: accuracy and margin, read over the cache as a method keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.steer.label_scores import label_tokens, margins, truth_of

from .judge import Sample, Values, check_room, held, prefill
from .labels import Example


def samples(
    model: Any, tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], template: str
) -> list[Sample]:
    """One sample an example.

    The last token of the prompt is read in a step of its own, so that a method which shortens the
    cache shows.

    Raises:
        InputError: an unknown label, labels that begin alike, a template without `{text}`.
    """
    if "{text}" not in template:
        raise InputError(f"the template {template!r} has no {{text}} where the text goes")
    truth = truth_of([e.label for e in examples], labels)
    tokens = label_tokens(tokenizer, labels)
    found = []
    for number, (example, right) in enumerate(zip(examples, truth)):
        ids = torch.as_tensor(tokenizer(template.replace("{text}", example.text))["input_ids"])
        check_room(model, len(ids))
        found.append(_sample(number, ids[None], tokens, right))
    return found


def _sample(number: int, ids: Tensor, tokens: Tensor, right: int) -> Sample:
    def measure(model: Any) -> Values:
        own = ids.to(model.device)
        cache = prefill(model, own[:, :-1])
        values: Values = {"held": held(cache)}
        logits = model(own[:, -1:], past_key_values=cache, use_cache=True).logits
        chosen = logits[:, -1, tokens.to(model.device)].cpu()
        margin = float(margins(chosen, torch.tensor([right])))
        return values | {"correct": float(chosen.argmax(-1) == right), "margin": margin}

    return Sample("labels", number, measure)
