"""Pieces of tokens, joined, are the decoded text: spaces, subwords and broken characters."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertTokenizer, T5Tokenizer

from regard.watching.tokens import pieces

WORDS = ["the", "old", "keeper", "was", "tired", "un", "##easy"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece() -> Any:
    return BertTokenizer(vocab={w: i for i, w in enumerate([*SPECIAL, *WORDS])})


def sentencepiece() -> Any:
    words = [("▁" + w, -1.0) for w in WORDS[:5]]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words])


@pytest.mark.parametrize(
    ("tokenizer", "text", "said"),
    [
        (wordpiece, "the old keeper was uneasy", ["the", " old", " keeper", " was", " un", "easy"]),
        (sentencepiece, "the old keeper was tired", ["the", " old", " keeper", " was", " tired"]),
    ],
)
def test_spaces_and_subwords(tokenizer: Any, text: str, said: list[str]) -> None:
    tokenizer = tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert pieces(tokenizer, ids) == said
    assert "".join(said) == tokenizer.decode(ids)
