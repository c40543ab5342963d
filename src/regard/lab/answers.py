"""Greedy answers of a model with and without methods, timed, and how they differ."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.parts.decoding.cache import held_bytes
from regard.watching import apply


@dataclass(frozen=True)
class Answer:
    """A greedy answer, what it cost, and the log-probabilities of its first token.

    Attributes:
        tokens: ids of the answer.
        prefill_seconds: until the first token.
        tokens_per_second: after the first token; None where there is no other.
        prompt_bytes, end_bytes: of keys and values, after the prompt and at the end.
        first: log-probabilities of the first token, `[vocabulary]`.
    """

    tokens: list[int]
    prefill_seconds: float
    tokens_per_second: float | None
    prompt_bytes: int
    end_bytes: int
    first: Tensor = field(repr=False)

    def as_dict(self, tokenizer: Any) -> dict[str, Any]:
        """The answer as text, and the figures."""
        plain = {n: v for n, v in asdict(self).items() if n != "first"}
        return {"answer": tokenizer.decode(self.tokens), **plain, "tokens": len(self.tokens)}


def answer(
    model: Any, inputs: Mapping[str, Any], tokens: int, methods: Sequence[Any] = ()
) -> Answer:
    """The greedy answer of at most `tokens` tokens under these methods."""
    from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

    cache = DynamicCache(config=model.config)
    stamps: list[float] = []
    first: list[tuple[Tensor, int]] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        if not first:
            first.append((scores[0].double().log_softmax(-1), held_bytes(cache)))
        return scores

    def stamp(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = time.perf_counter()
    with torch.no_grad(), apply(model, *methods):
        out = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([keep]),
            stopping_criteria=StoppingCriteriaList([stamp]),
        )
    rate = (len(stamps) - 1) / (stamps[-1] - stamps[0]) if len(stamps) > 1 else None
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(new, stamps[0] - start, rate, first[0][1], held_bytes(cache), first[0][0])


def divergence(p: Tensor, q: Tensor) -> float:
    """Kullback-Leibler divergence of log-probabilities `p` from `q`, in nats."""
    return max(float((p.exp() * (p - q)).nan_to_num().sum()), 0.0)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two answers part, None where they are the same.

    >>> first_difference([1, 2, 3], [1, 5, 3]), first_difference([1], [1, 2])
    (1, 1)
    """
    apart = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), None)
    return min(len(a), len(b)) if apart is None and len(a) != len(b) else apart


def compared(tokenizer: Any, plain: Answer, changed: Answer) -> dict[str, Any]:
    """Both answers with their figures, where they part, and how far apart their first tokens are.

    Args:
        tokenizer: decodes the answers.
    """
    apart = first_difference(plain.tokens, changed.tokens)
    both = {"plain": plain, "changed": changed}
    where = slice(0) if apart is None else slice(apart, apart + 1)
    tokens = {n: tokenizer.decode(a.tokens[where]) for n, a in both.items()}
    rates = plain.tokens_per_second, changed.tokens_per_second
    return {
        **{n: a.as_dict(tokenizer) for n, a in both.items()},
        "first_difference": None if apart is None else {"token": apart, **tokens},
        "kl": divergence(plain.first, changed.first),
        "bytes_ratio": changed.prompt_bytes / max(plain.prompt_bytes, 1),
        "speed_ratio": rates[1] / rates[0] if rates[0] and rates[1] else None,
    }


@contextmanager
def noted(method: str) -> Iterator[list[str]]:
    """Collect what a method warns of, for the result's notes; other warnings are dropped."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    texts = dict.fromkeys(str(w.message) for w in caught)
    notes += [text for text in texts if text.startswith(f"{method}: ")]
