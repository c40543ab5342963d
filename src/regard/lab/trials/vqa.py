"""Questions about drawn scenes: how many answers stay right under a method, by kind of question.

Scenes and questions are drawn anew from a seed; the model reads pictures and text through its own
processor. An answer is right when every token of it is the model's first choice after the right
ones before, which is what greedy decoding gives; the right answer is read along with the question,
in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.lab.intervals import bootstrap, mean
from regard.zoo.train import questions
from regard.zoo.train.drawing import sample

KINDS = ("existence", "color", "shape", "count", "relation", "neighbour", "place", "comparison")
SIDE = 64


@dataclass(frozen=True)
class Item:
    """A picture, a question and its answer."""

    picture: Any
    question: str
    answer: str
    kind: str
    probe: bool


def items(
    count: int,
    kinds: Sequence[str] = KINDS,
    *,
    seed: int = 0,
    held_out: bool | None = None,
    things: Sequence[int] = (2, 3),
) -> list[Item]:
    """So many questions of each kind, each about a scene of its own.

    >>> [i.kind for i in items(2, ["count", "relation"])]
    ['count', 'count', 'relation', 'relation']

    Raises:
        InputError: an unknown kind, or none.
    """
    from PIL import Image

    wrong = [k for k in kinds if k not in questions.KINDS]
    if wrong or not kinds:
        raise InputError(f"kinds are {', '.join(questions.KINDS)}, not {wrong or 'none'}")
    drawn_items: list[Item] = []
    for n, kind in enumerate(kinds):
        make = torch.Generator().manual_seed(1000 * seed + n)
        kept: list[Item] = []
        while len(kept) < count:
            drawn = sample(
                4 * count, generator=make, things=tuple(things), held_out=held_out,
                digits=1.0 if kind == "digit" else 0.0,
            )  # fmt: skip
            asked = questions.ask(drawn, kind, make)
            fits = (asked.kind == questions.KINDS.index(kind)).nonzero()[:, 0]
            chosen = fits[: count - len(kept)]
            pictures = (255 * drawn[chosen].images(SIDE)).round().byte().permute(0, 2, 3, 1)
            for at, pixels in zip(chosen.tolist(), pictures):
                kept.append(
                    Item(
                        Image.fromarray(pixels.numpy()),
                        questions.spell(asked.question[at]),
                        questions.spell(asked.answer[at]),
                        kind,
                        bool(asked.probe[at]),
                    )
                )
        drawn_items += kept
    return drawn_items


@dataclass(frozen=True)
class Read:
    """A batch as the model takes it; answers end each row.

    `targets` and `where` are the answers' tokens and the places that predict them,
    `[rows, most]`, -1 where a row has fewer.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    where: Tensor


def read(processor: Any, given: Sequence[Item], device: Any = "cpu") -> Read:
    """Put questions and answers through the processor, padded on the left."""
    tokenizer = processor.tokenizer
    texts, answers = [], []
    for item in given:
        question = item.question.replace(" ?", "?").replace(" .", ".")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        )
        answers.append(tokenizer(f" {item.answer}", add_special_tokens=False).input_ids)
    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        encoded = processor(
            images=[i.picture for i in given],
            text=[f"{t} {i.answer}" for t, i in zip(texts, given)],
            return_tensors="pt",
            padding=True,
        )
    finally:
        tokenizer.padding_side = before
    length, most = encoded["input_ids"].shape[1], max(map(len, answers))
    targets = torch.full((len(given), most), -1)
    where = torch.zeros_like(targets)
    for row, answer in enumerate(answers):
        targets[row, : len(answer)] = torch.tensor(answer)
        where[row, : len(answer)] = torch.arange(length - len(answer) - 1, length - 1)
        if encoded["input_ids"][row, length - len(answer) :].tolist() != answer:
            raise InputError(
                "this tokenizer joins an answer with what stands before it, so the trial cannot "
                "tell them apart: use a model whose chat template ends in a space or a new line"
            )
    return Read({n: t.to(device) for n, t in encoded.items()}, targets.to(device), where.to(device))


@torch.no_grad()
def score(
    model: Any,
    processor: Any,
    given: Sequence[Item],
    method: Callable[[], Any] | None = None,
    *,
    batch_size: int = 32,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """For every item whether the answer is right, and the log-probability of the right one.

    Yes-no questions also get "margin", the log-probability of the right over the wrong word.

    Args:
        method: makes the context in which the model answers, such as a `regard.apply`; a new one
            for each batch.
    """
    tokenizer, scores = processor.tokenizer, list[dict[str, float]]()
    ids = {w: tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in ("yes", "no")}
    for start in range(0, len(given), batch_size):
        some = given[start : start + batch_size]
        batch = read(processor, some, model.device)
        with method() if method is not None else nullcontext():
            logits = model(**batch.inputs).logits
        rows = torch.arange(len(some), device=logits.device)[:, None]
        log_probs = logits[rows, batch.where].float().log_softmax(-1)
        real = batch.targets >= 0
        right = ((log_probs.argmax(-1) == batch.targets) | ~real).all(1)
        chance = log_probs.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
        total = (chance * real).sum(1)
        for n, item in enumerate(some):
            entry = {"right": float(right[n]), "log_probability": float(total[n])}
            if item.answer in ids:
                other = ids["no" if item.answer == "yes" else "yes"]
                entry["margin"] = float(log_probs[n, 0, ids[item.answer]] - log_probs[n, 0, other])
                entry["yes"] = float(log_probs[n, 0, ids["yes"]] > log_probs[n, 0, ids["no"]])
            scores.append(entry)
        advance()
    return scores


def summary(given: Sequence[Item], scores: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Accuracy by kind, over all, and of the probes of hallucination, each with its interval."""
    groups: dict[str, list[float]] = {}
    for item, entry in zip(given, scores):
        groups.setdefault(item.kind, []).append(entry["right"])
        if item.probe:
            groups.setdefault("existence probe", []).append(entry["right"])
    groups["all"] = [entry["right"] for entry in scores]
    return {
        name: {
            "right": mean(values),
            "interval": list(bootstrap(values)),
            "asked": len(values),
        }
        for name, values in groups.items()
    }
