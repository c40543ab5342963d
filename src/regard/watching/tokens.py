"""The tokens of a text as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LONGEST = 8  # more tokens than any character has


def reader(tokenizer: Any) -> Any:
    """What turns text into tokens: of a processor, which reads pictures too, its tokenizer."""
    from transformers import ProcessorMixin

    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, spaces included: joined they are the decoded text.

    A token is read after the one before it, since many tokenizers drop a space at the start and
    mark the pieces of a word. A character of several tokens stands whole at the last of them, and
    the others say nothing.
    """
    texts: list[str] = []
    before, start = list[int](), ""  # the last tokens that make whole characters, and their text
    held: list[int] = []
    for n in ids:
        held.append(n)
        text = tokenizer.decode([*before, *held])
        text = text[len(start) :] if text.startswith(start) else tokenizer.decode(held)
        cut = text.endswith("\ufffd")
        texts.append("" if cut else text)
        if not cut or len(held) == _LONGEST:
            if cut:  # bytes that make no character
                texts[-_LONGEST:] = [tokenizer.decode([m]) for m in held]
            before = [] if cut else held
            start = tokenizer.decode(before) if before else ""
            held = []
    if held:  # the text ends within a character
        texts[-len(held) :] = [tokenizer.decode([m]) for m in held]
    return texts
