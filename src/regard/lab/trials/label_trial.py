"""Label scoring as a trial: accuracy and margin, read over the cache as a method keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regard.errors import InputError
from regard.parts.labels import check_model, label_tokens, margins, truth_of

from .frame import Batch, Values, check_room, step
from .labels import TASKS, Example, Task, fill, read_examples, sentences


def task(
    given: str, *, template: str | None = None, examples: int = 80, seed: int = 0
) -> tuple[Task, list[Example]]:
    """The labels, the prompt and the examples behind the name of a built-in task or a file.

    Args:
        given: a name of `labels.TASKS`, or a file of JSON lines with text and label.
        template: the prompt of a file's texts; "{text}\\nLabel:" when None.
        examples: how many at most.

    >>> how, found = task("topic", examples=8)
    >>> how.labels, len(found)
    (('business', 'food', 'music', 'sports'), 8)

    Raises:
        InputError: no such task or file, a template with a built-in task or without {text}.
    """
    if examples < 1:
        raise InputError(f"examples is at least 1, not {examples}")
    if given in TASKS or not (Path(given).suffix or Path(given).exists()):
        if template is not None:
            raise InputError("a template goes with a file: the built-in tasks bring their own")
        loaded = sentences(given, examples, seed)
        return TASKS[given], loaded
    loaded = read_examples(given)[:examples]
    labelling = Task(tuple(sorted({e.label for e in loaded})), template or "{text}\nLabel:")
    fill(labelling.template, "")
    return labelling, loaded


def batches(
    model: Any, tokenizer: Any, examples: Sequence[Example], task: Task, *, name: str = "labels"
) -> list[Batch]:
    """One text each: prompts differ in length, and nothing is padded.

    The last token of the prompt is read in a step of its own, so that a method which shortens the
    cache shows.

    Raises:
        InputError: an unknown label, labels that begin alike, a prompt of one token or too long.
    """
    check_model(model, tokenizer)
    truth = truth_of([e.label for e in examples], task.labels)
    tokens = label_tokens(tokenizer, task.labels)
    texts = []
    for number, (example, right) in enumerate(zip(examples, truth)):
        ids = torch.as_tensor(tokenizer(fill(task.template, example.text))["input_ids"])
        check_room(model, len(ids))
        if len(ids) < 2:
            raise InputError("a prompt of one token leaves no cache: give longer texts")
        texts.append(_batch(name, number, ids[None], tokens, right))
    return texts


def _batch(name: str, number: int, ids: Any, tokens: Any, right: int) -> Batch:
    def measure(model: Any, cache: Any) -> list[Values]:
        logits = step(model, ids[:, -1:].to(model.device), cache)
        chosen = logits[:, tokens.to(model.device)].float().cpu()
        margin = float(margins(chosen, torch.tensor([right]))[0])
        return [{"correct": float(int(chosen.argmax(-1)) == right), "margin": margin}]

    return Batch(name, (number,), ids[:, :-1], measure)
