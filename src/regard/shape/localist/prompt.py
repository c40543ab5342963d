"""Documents and a question as one prompt, and which tokens each document has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

TEMPLATE = "Answer from the documents in a few words."


@dataclass(frozen=True)
class Prompt:
    """Token ids `[1, tokens]`, and the token ranges of each document by name."""

    ids: Tensor
    blocks: dict[str, list[list[int]]]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}


def with_documents(
    tokenizer: Any,
    documents: Mapping[str, str],
    question: str,
    *,
    chat: bool = True,
    device: Any = None,
) -> Prompt:
    """The documents one after another and the question behind them, in the chat template if there
    is one.

    A document's block is its text, without the line that names it. Documents are found in the
    finished prompt by their place, so the same text twice is two blocks.

    Raises:
        InputError: fewer than two documents, or one without words.
    """
    if len(documents) < 2:
        raise InputError("the dial chooses among documents: give two at least")
    content, places = f"{TEMPLATE}\n\n", {}
    for name, text in documents.items():
        text = text.strip()
        if not text:
            raise InputError(f"document {name} is empty: give some words")
        content += f"Document {name}:\n"
        places[name] = (len(content), len(content) + len(text))
        content += f"{text}\n\n"
    content += f"Question: {question}"
    template = chat and bool(getattr(tokenizer, "chat_template", None))
    start, whole = 0, content
    if template:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        start = whole.find(content)
        if start < 0:
            raise InputError("the chat template changes the text: leave it out with --no-chat")
    # cut at the borders of the documents, so that no token belongs to two blocks
    cuts = sorted({0, len(whole), *(start + n for pair in places.values() for n in pair)})
    ids: list[int] = []
    begins = {}
    for first, end in pairwise(cuts):
        begins[first] = len(ids)
        special = not template and not first
        ids += tokenizer(whole[first:end], add_special_tokens=special)["input_ids"]
    begins[len(whole)] = len(ids)
    blocks = {n: [[begins[start + a], begins[start + b]]] for n, (a, b) in places.items()}
    return Prompt(torch.tensor([ids], device=device), blocks)
