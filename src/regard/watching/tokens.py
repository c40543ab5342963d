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
    """What each token says. A character of several tokens stands whole at the last of them, and
    the others say nothing.
    """
    said: list[str] = []
    held: list[int] = []
    for n in ids:
        held.append(n)
        text = tokenizer.decode(held)
        cut = text.endswith("\ufffd")
        said.append("" if cut else text)
        if not cut or len(held) == _LONGEST:
            if cut:  # bytes that make no character
                said[-_LONGEST:] = [tokenizer.decode([m]) for m in held]
            held = []
    if held:  # the text ends within a character
        said[-len(held) :] = [tokenizer.decode([m]) for m in held]
    return said
