"""What the methods that answer a prompt share: its options and token ids, answers with and without
methods, and how they differ.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import read_text
from regard.errors import InputError

Prompt = Annotated[str, typer.Option(help="The text itself, or @file, or @name.")]
Question = Annotated[str | None, typer.Option(help="What to ask about the text; put after it.")]
Words = Annotated[int | None, typer.Option(min=1, help="Read only so many words of the prompt.")]
Model = Annotated[str, typer.Option(help="A name of `regard models`, a folder or a hub id.")]
Tokens = Annotated[int, typer.Option("-n", "--tokens", min=1, help="Length of the answer.")]
Chat = Annotated[
    bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")
]
Json = Annotated[Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")]


def prompt_text(prompt: str, question: str | None, words: int | None) -> str:
    """The text, its first words if so many are asked for, and the question."""
    content = read_text(prompt)
    if words is not None:
        content = " ".join(content.split(" ")[:words])
    return content if question is None else f"{content.rstrip()}\n\n{question}"


def prompt_ids(content: str, model: Any, tokenizer: Any, tokens: int, chat: bool) -> Any:
    """Token ids of the prompt, `[1, tokens]`."""
    from regard.parts.labels import check_model
    from regard.watching.tokens import reader

    tokenizer = reader(tokenizer)
    check_model(model, tokenizer)
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

    def as_dict(self, tokenizer: Any) -> dict[str, Any]:
        """The answer as text, and the figures."""
        text = tokenizer.decode(self.tokens)
        return {"answer": text, **asdict(self), "tokens": len(self.tokens)}


def timed_answer(
    model: Any, ids: Any, tokens: int, methods: list[Any], step: Callable[[], None] | None = None
) -> Answer:
    """The greedy answer, under these methods or, without any, by the model as it is."""
    import torch
    from transformers import DynamicCache, StoppingCriteriaList

    from regard.watching import apply

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
    from regard.parts.decoding.cache import MethodLayer

    total = 0
    for layer in cache.layers:
        if isinstance(layer, MethodLayer):
            total += layer.nbytes
        elif layer.is_initialized:
            total += sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
    return total


def timed_pair(tokenizer: Any, full: Answer, name: str, short: Answer) -> dict[str, Any]:
    """Both answers, the full one as "full" and the other by its name, and the ratio of speeds."""
    rates = full.tokens_per_second, short.tokens_per_second
    return {
        "full": full.as_dict(tokenizer),
        name: short.as_dict(tokenizer),
        "speed_ratio": rates[1] / rates[0] if rates[0] and rates[1] else None,
    }


def greedy_answer(
    model: Any, inputs: Mapping[str, Any], tokens: int, methods: list[Any]
) -> tuple[list[int], Any]:
    """The greedy answer, and the log-probabilities of its first token."""
    import torch

    from regard.watching import apply

    with torch.no_grad(), apply(model, *methods):
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    start = inputs["input_ids"].shape[1]
    return out.sequences[0, start:].tolist(), out.logits[0][0].double().log_softmax(-1)


def divergence(p: Any, q: Any) -> float:
    """Kullback-Leibler divergence of log-probabilities `p` from `q`, in nats."""
    return max(float((p.exp() * (p - q)).nan_to_num().sum()), 0.0)


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two answers part, None where they are the same."""
    apart = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), None)
    return min(len(a), len(b)) if apart is None and len(a) != len(b) else apart


def parting(tokenizer: Any, **answers: list[int]) -> dict[str, Any] | None:
    """Where two answers, given by name, part, and what each says there."""
    apart = first_difference(*answers.values())
    if apart is None:
        return None
    said = {name: tokenizer.decode(ids[apart : apart + 1]) for name, ids in answers.items()}
    return {"token": apart, **said}


@contextmanager
def noted(method: str) -> Iterator[list[str]]:
    """Collect what a method warns of, for the result's notes; other warnings are dropped."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    said = [str(w.message) for w in caught]
    notes += [text for text in said if text.startswith(f"{method}: ")]
