"""What the methods that answer a prompt share: its token ids, and an answer with its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.errors import InputError


def prompt_ids(content: str, model: Any, tokenizer: Any, tokens: int, chat: bool) -> Any:
    """Token ids of the prompt, `[1, tokens]`."""
    if tokenizer is None or not callable(tokenizer) or not hasattr(model, "generate"):
        raise InputError(f"{type(model).__name__} does not answer texts: name a language model")
    template = chat and bool(getattr(tokenizer, "chat_template", None))
    if template:
        content = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    # the template writes its own special tokens
    ids = tokenizer(content, return_tensors="pt", add_special_tokens=not template).input_ids
    ids = ids.to(model.device)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and ids.shape[1] + tokens > room:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens and the answer {tokens}, but the model has "
            f"{room} positions: shorten one of them"
        )
    return ids


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, how long it took, and the bytes of keys and values held."""

    tokens: list[int]
    prefill_seconds: float
    tokens_per_second: float | None  # after the first token; None when there is no other
    prompt_bytes: int  # at the end of the prompt
    end_bytes: int


def timed_answer(
    model: Any, ids: Any, tokens: int, methods: list[Any], step: Callable[[], None] | None = None
) -> Answer:
    """The greedy answer, under these methods or, without any, by the model as it is."""
    import torch
    from transformers import DynamicCache, StoppingCriteriaList

    from regard.api import apply

    cache = DynamicCache(config=model.config)
    stamps: list[float] = []
    held: list[int] = []

    def stamp(*_: Any, **__: Any) -> Any:
        stamps.append(time.perf_counter())
        if not held:
            held.append(held_bytes(cache))
        if step is not None:
            step()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def generate() -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamp]),
        )

    start = time.perf_counter()
    with torch.no_grad():
        if methods:
            with apply(model, *methods):
                out = generate()
        else:
            out = generate()
    rate = (len(stamps) - 1) / (stamps[-1] - stamps[0]) if len(stamps) > 1 else None
    return Answer(
        out[0, ids.shape[1] :].tolist(), stamps[0] - start, rate, held[0], held_bytes(cache)
    )


def held_bytes(cache: Any) -> int:
    """Bytes of the keys and values of a cache, counted from storage."""
    from regard.reach.cache import MethodLayer

    total = 0
    for layer in cache.layers:
        if isinstance(layer, MethodLayer):
            total += layer.nbytes
        elif layer.is_initialized:
            total += sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
    return total


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two answers part, None where they are the same."""
    apart = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), None)
    return min(len(a), len(b)) if apart is None and len(a) != len(b) else apart
