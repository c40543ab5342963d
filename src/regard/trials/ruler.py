"""The RULER task family, made on the spot: needles, chains, counts and questions in a long text.

Paper: "RULER: What's the Real Context Size of Your Long-Context Language Models?", Hsieh et al.,
2024, arXiv 2404.06654. A prompt is filled until it has the asked length in tokens of the model's
own tokenizer, the answer is decoded greedily, and the score is the share of the wanted strings that
it holds (for questions: whether it holds the answer).

Deviations:
- The long text, the words and the passages of the questions come from the shipped book; adjectives
  and nouns of the needles' keys from two short lists.
- Common words: 5 of them, 10 times each, among words that appear once; the paper has 10, 30 times
  each, which does not fit into a thousand tokens. No worked example stands before a prompt.
- An answer may be a quarter longer than the wanted strings and 8 tokens; the paper allows 30 to 128
  tokens whatever is asked for.
- The last token of the prompt is read in a step of its own, so that every token of the answer is
  predicted over the cache as a method keeps it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, nearest

from .judge import Sample, Values, check_room, held, prefill
from .ruler_tasks import TASKS, Puzzle

__all__ = ["TASKS", "samples", "recall"]


def samples(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    length: int = 768,
    count: int = 10,
    seed: int = 0,
    chat: bool = True,
) -> list[Sample]:
    """So many prompts of every task, answers included at most `length` tokens each.

    Args:
        tasks: names of `TASKS`.
        chat: put the prompt into the model's chat template, if it has one.

    Raises:
        InputError: an unknown task, a length that the model or the task cannot have.
    """
    if not tasks:
        raise InputError(f"name at least one task: {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"there is no task {task!r}.{nearest(task, TASKS)}")
    if count < 1:
        raise InputError(f"at least one sample a task is needed, not {count}")
    check_room(model, length)
    tokenizer.model_max_length = int(1e30)  # prompts are fitted here; its warning would be wrong
    made = []
    for number in range(count):  # a run that is cut short has seen all tasks
        for task in dict.fromkeys(tasks):
            puzzle = TASKS[task](random.Random(f"{seed}/{task}/{number}"), number)
            ids, room = fit(puzzle, tokenizer, length, chat)
            made.append(_sample(task, number, ids, room, puzzle, tokenizer))
    return made


def fit(puzzle: Puzzle, tokenizer: Any, length: int, chat: bool = True) -> tuple[Tensor, int]:
    """The longest prompt of a puzzle `[1, tokens]` that leaves room for its answer, and that room.

    Raises:
        InputError: the puzzle does not fit without any filling.
    """
    wanted = len(tokenizer(" ".join(puzzle.answers), add_special_tokens=False)["input_ids"])
    room = wanted + -(-wanted // 4) + 8

    def ids(size: int) -> list[int]:
        return _ids(puzzle.prompt(size), puzzle.prefix, tokenizer, chat)

    least = len(ids(0)) + room
    if least > length:
        raise InputError(f"{length} tokens are too few: this task needs {least} unfilled")
    low, high = 0, 1
    while len(ids(high)) + room <= length:
        low, high = high, 2 * high
        if high > 8 * length:
            raise InputError("the tokenizer finds no tokens in the filling: give another model")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(ids(middle)) + room <= length else (low, middle)
    return torch.tensor([ids(low)]), room


def _ids(prompt: str, prefix: str, tokenizer: Any, chat: bool) -> list[int]:
    template = chat and bool(getattr(tokenizer, "chat_template", None))
    if template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    # the beginning of the answer is given, as in the paper; the template has its special tokens
    text = prompt + (prefix if template else f" {prefix}")
    return list(tokenizer(text, add_special_tokens=not template)["input_ids"])


def _sample(
    task: str, number: int, ids: Tensor, room: int, puzzle: Puzzle, tokenizer: Any
) -> Sample:
    def measure(model: Any) -> Values:
        said, size = answer(model, ids.to(model.device), room)
        text = tokenizer.decode(said, skip_special_tokens=True)
        values = {"recall": recall(text, puzzle.answers), "held": size, "tokens": ids.shape[1]}
        return values | {"answers": list(puzzle.answers), "said": text}

    return Sample(task, number, measure)


def answer(model: Any, ids: Tensor, room: int) -> tuple[list[int], int]:
    """The greedy answer to a prompt `[1, tokens]`, and the bytes its cache held at the start."""
    cache = prefill(model, ids[:, :-1])
    size = held(cache)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=room,
        do_sample=False,
    )
    return out[0, ids.shape[1] :].tolist(), size


def recall(said: str, wanted: Sequence[str]) -> float:
    """Share of the wanted strings that an answer holds, whatever their case.

    >>> recall("They are 12 and 7.", ["12", "7", "30", "41"])
    0.5
    """
    return sum(w.casefold() in said.casefold() for w in wanted) / len(wanted)
