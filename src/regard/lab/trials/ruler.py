"""The RULER task family, made on the spot: needles, chains, counts and questions in a long text.

Paper: "RULER: What's the Real Context Size of Your Long-Context Language Models?", Hsieh et al.,
2024, arXiv 2404.06654. A prompt is filled until it has the asked length in tokens of the model's
own tokenizer, the answer is decoded greedily, and the score is the share of the wanted strings that
it holds (for questions: whether it holds the answer).

Deviations:
- The long text, the words and the passages of the questions come from the shipped book; adjectives
  and nouns of the needles' keys from two short lists. The filling may end in the middle of a
  sentence, so that prompts are equally long.
- Common words: 5 of them, 10 times each, among words that appear once; the paper has 10, 30 times
  each, which does not fit into a thousand tokens. No worked example stands before a prompt.
- An answer may be a quarter longer than the wanted strings and 8 tokens; the paper allows 30 to 128
  tokens whatever is asked for.
- The last token of the prompt is read in a step of its own, so that every token of the answer is
  predicted over the cache as a method keeps it.
- One needle is asked for among 4 in `multi-key`; the paper's variants whose whole text consists of
  needles are left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, nearest
from regard.parts.labels import check_model

from .frame import Batch, Floor, Values, check_room, step
from .ruler_tasks import TASKS, Puzzle

__all__ = ["CEILING", "TASKS", "batches", "names", "recall"]

CEILING = Floor("recall", 0.3)
"""A task that the untouched model does not solve to at least this share is too hard for it: what a
method does to it cannot be told from noise."""


def names(given: str) -> list[str]:
    """The tasks of a line such as "single-text,multi-key", or of "all".

    Raises:
        InputError: an unknown task, or none.
    """
    requested = [n.strip() for n in given.split(",") if n.strip()]
    if requested == ["all"]:
        return list(TASKS)
    for task in requested:
        if task not in TASKS:
            raise InputError(f"there is no task {task!r}.{nearest(task, [*TASKS, 'all'])}")
    if not requested:
        raise InputError(f"name at least one task, or all: {', '.join(TASKS)}")
    return list(dict.fromkeys(requested))


def batches(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    length: int = 512,
    examples: int = 20,
    seed: int = 0,
    chat: bool = True,
    batch_size: int = 8,
) -> list[Batch]:
    """So many prompts of every task, answers included at most `length` tokens each; those equally
    long in batches.

    Args:
        tasks: names of `TASKS`.
        chat: put the prompt into the model's chat template, if it has one.
        batch_size: prompts read at once; nothing is padded.

    Raises:
        InputError: an unknown task, a length that the model or the task cannot have.
    """
    check_model(model, tokenizer)
    chosen_tasks = names(",".join(tasks))
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is at least 1, not {value}")
    check_room(model, length)
    groups: list[Batch] = []
    for task in chosen_tasks:
        puzzles = [TASKS[task](random.Random(f"{seed}/{task}/{n}"), n) for n in range(examples)]
        rooms = [_room(p, tokenizer) for p in puzzles]
        size = length - max(rooms)
        prompts = [fit(p, tokenizer, size, chat=chat, task=task) for p in puzzles]
        shortest = min(ids.shape[1] for ids in prompts)
        alike: dict[int, list[int]] = {}
        for number, puzzle in enumerate(puzzles):  # the more are equally long, the fewer batches
            ids = fit(puzzle, tokenizer, shortest, chat=chat, task=task)
            prompts[number] = ids
            alike.setdefault(ids.shape[1], []).append(number)
        for numbers in alike.values():
            for at in range(0, len(numbers), batch_size):
                row_numbers = tuple(numbers[at : at + batch_size])
                rows = torch.cat([prompts[n] for n in row_numbers])
                chosen = [puzzles[n] for n in row_numbers]
                groups.append(
                    _batch(
                        task, row_numbers, rows, chosen, [rooms[n] for n in row_numbers], tokenizer
                    )
                )
    return groups


def _room(puzzle: Puzzle, tokenizer: Any) -> int:
    """How many tokens an answer may have."""
    length = len(tokenizer(" ".join(puzzle.answers), add_special_tokens=False)["input_ids"])
    return length + -(-length // 4) + 8


def fit(
    puzzle: Puzzle, tokenizer: Any, size: int, *, chat: bool = True, task: str = "this"
) -> Tensor:
    """The longest prompt of a puzzle of at most `size` tokens, `[1, tokens]`.

    Raises:
        InputError: the puzzle does not fit without any filling.
    """

    def ids(filling: int) -> list[int]:
        return _ids(puzzle.prompt(filling), puzzle.prefix, tokenizer, chat)

    least = len(ids(0))
    if least > size:
        raise InputError(
            f"the task {task} needs {least - size} tokens more than that: give a greater length"
        )
    low, high = 0, 1
    while len(ids(high)) <= size:
        low, high = high, 2 * high
        if high > 8 * size:
            raise InputError("the tokenizer finds no tokens in the filling: give another model")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(ids(middle)) <= size else (low, middle)
    return torch.tensor([ids(low)])


def _ids(prompt: str, prefix: str, tokenizer: Any, chat: bool) -> list[int]:
    template = chat and bool(getattr(tokenizer, "chat_template", None))
    if template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    # the beginning of the answer is given, as in the paper; the template has its special tokens
    text = prompt + (prefix if template else f" {prefix}")
    return list(tokenizer(text, add_special_tokens=not template, verbose=False)["input_ids"])


def _batch(
    task: str,
    numbers: tuple[int, ...],
    ids: Tensor,
    puzzles: list[Puzzle],
    rooms: list[int],
    tokenizer: Any,
) -> Batch:
    def measure(model: Any, cache: Any) -> list[Values]:
        answers = answer(model, cache, ids[:, -1:], max(rooms), _ends(model, tokenizer))
        scores: list[Values] = []
        for row, room, puzzle in zip(answers, rooms, puzzles):
            text = tokenizer.decode(row[:room], skip_special_tokens=True)
            hits = recall(text, puzzle.answers)
            scores.append({"recall": hits, "answers": list(puzzle.answers), "said": text})
        return scores

    return Batch(task, numbers, ids[:, :-1], measure)


def answer(
    model: Any, cache: Any, last: Tensor, room: int, ends: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy answers over a cache, each up to the first of the tokens `ends`.

    Args:
        last: the last token of every prompt, `[batch, 1]`, which the cache does not hold.
        room: tokens of an answer at most.
    """
    last = last.to(model.device)
    stop = torch.tensor(list(ends), device=last.device, dtype=torch.long)
    done = torch.zeros(len(last), dtype=torch.bool, device=last.device)
    tokens = []
    for _ in range(room):
        last = step(model, last, cache).argmax(-1, keepdim=True)
        tokens.append(last)
        done |= torch.isin(last[:, 0], stop)
        if bool(done.all()):
            break
    rows, stops = torch.cat(tokens, 1).tolist(), set(ends)
    cut = [next((n for n, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:n] for row, n in zip(rows, cut)]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(given) if isinstance(given, (list, tuple)) else [given]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    return sorted({int(n) for n in ids if n is not None})


def recall(text: str, answers: Sequence[str]) -> float:
    """Share of the wanted strings that an answer holds, whatever their case.

    >>> recall("They are 12 and 7.", ["12", "7", "30", "41"])
    0.5
    """
    return sum(w.casefold() in text.casefold() for w in answers) / len(answers)
