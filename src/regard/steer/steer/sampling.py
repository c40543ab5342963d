"""Samples of an expert, each of which may be a negative of a later one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from regard.errors import InputError

from .method import ContrastiveExpertGuidance
from .streams import room_of


@dataclass(frozen=True)
class Sample:
    """One sampled text, the places of its negatives in the pool, and how it was made."""

    text: str
    negatives: list[int]
    gamma: float
    eta: float
    seed: int
    shift: float  # mean |s - f(c)| over the steps and the vocabulary

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def sample(
    expert: Any,
    tokenizer: Any,
    prompt: str,
    pool: list[str],
    *,
    count: int,
    base: Any = None,
    gamma: float = 0.5,
    eta: float = 0.2,
    k: int = 10,
    alpha: float = 0.0,
    tokens: int = 40,
    batch: int = 1,
    seed: int = 0,
    start: int = 0,
    sampler: dict[str, Any] | None = None,
) -> Iterator[Sample]:
    """Samples one after another; each joins `pool` (in place) and may be a later one's negative.

    With `batch` > 1 the rows of a batch do not see each other, which is ours. Sampling is top-k 10
    at temperature 1, after the guidance; `sampler` says otherwise (`top_k`, `top_p`,
    `temperature`). Every batch has a seed of its own, so that a run can go on at `start`. The state
    of torch's random numbers is put back.
    """
    if eta and not pool:
        raise InputError("the pool of negatives is empty: give some, or eta=0")
    if eta and k > len(pool):
        warnings.warn(
            f"STEER: only {len(pool)} of k={k} negatives are there: all are used", stacklevel=2
        )
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(expert.device)
    chain = {"temperature": 1.0, "top_k": 10, "top_p": 1.0, **(sampler or {})}
    for first in range(start, count, batch):
        rows = min(batch, count - first)
        draw = random.Random(seed * 1_000_003 + first)
        size = min(k, len(pool)) if eta else 0
        drawn = [draw.sample(range(len(pool)), size) for _ in range(rows)]
        texts = [[pool[n] for n in row] for row in drawn]
        guide = ContrastiveExpertGuidance(
            expert, base, texts, gamma, eta, tokenizer=tokenizer, k=k, alpha=alpha
        )
        check_room(expert, max(map(len, [*guide.negatives, ids[0]])), tokens)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed * 1_000_003 + first)
            out = expert.generate(
                input_ids=ids.expand(rows, -1),
                attention_mask=torch.ones_like(ids).expand(rows, -1),
                max_new_tokens=tokens,
                do_sample=True,
                renormalize_logits=True,
                logits_processor=[guide],
                pad_token_id=tokenizer.eos_token_id,
                **chain,
            )
        shift = torch.stack(guide.shift).mean(0).tolist() if guide.shift else [0.0] * rows
        for row, places, moved in zip(out[:, ids.shape[1] :], drawn, shift):
            text = clean(tokenizer.decode(row, skip_special_tokens=True))
            if text:
                pool.append(text)
            yield Sample(text, places, gamma, eta, seed, moved)


def clean(text: str) -> str:
    """The first answer alone: nothing from a further "###" header on, no line breaks.

    >>> clean(" One line.\\n### Sentence: another")
    'One line.'
    """
    return " ".join(text.split("###")[0].split())


def check_room(model: Any, longest: int, tokens: int) -> None:
    """Refuse texts that would outgrow the model before anything is sampled."""
    room = room_of(model)
    if room is not None and longest + tokens > room:
        raise InputError(
            f"prompt and negatives have up to {longest} tokens and a sample {tokens}, but the "
            f"expert has {room} positions: give fewer or shorter ones"
        )
