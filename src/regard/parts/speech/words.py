"""From token rows to words: which tokens make a word, and when it was said.

The alignment is dynamic time warping over the cross attention of a few heads, as OpenAI's Whisper
does it (Radford and others, 2022, arXiv 2212.04356, and their later code for word times).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.errors import InputError

FILTER = 7  # frames of the median filter along time
BLOCK = 32  # rows that are filtered at once
# Scripts that put no space between words: there every token is a word.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER")


@dataclass(frozen=True)
class Word:
    """A word of the transcript: its tokens are `first` to `last - 1`, its time is in seconds."""

    text: str
    first: int
    last: int
    start: float
    end: float


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds; the pieces of one character come with its last token.

    A piece that begins a word begins with a space (except the first), whatever the tokenizer's own
    mark is.
    """
    texts: list[str] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(int(token))
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in text and len(waiting) < 4:
            texts.append("")  # the first bytes of a character
            continue
        name = tokenizer.convert_ids_to_tokens(waiting[0])
        if isinstance(name, str) and name.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the space at the beginning of what it decodes
        texts.append(text)
        waiting = []
    return texts


def group(texts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the words of the pieces as (text, first token, last token + 1).

    A word begins at a space, or anywhere in scripts without spaces; punctuation belongs to the word
    before it.

    >>> group([" The", " sea", "shore", ",", " he"])
    [('The', 0, 1), ('seashore,', 1, 4), ('he', 4, 5)]
    """
    words: list[list[Any]] = []
    for place, text in enumerate(texts):
        shown = text.strip()
        begins = text[:1].isspace() or _unspaced(shown) or not words
        if shown and all(unicodedata.category(c)[0] in "PS" for c in shown):
            # An opening mark belongs to the word after it, any other to the one before.
            begins = not words or unicodedata.category(shown[0]) in ("Ps", "Pi")
        if words and not words[-1][0].strip():
            begins = False  # what came before holds no letter yet
        if words and all(unicodedata.category(c) in ("Ps", "Pi") for c in words[-1][0].strip()):
            begins = False
        if begins:
            words.append([text, place, place + 1])
        else:
            words[-1][0] += text
            words[-1][2] = place + 1
    return [(text.strip(), first, last) for text, first, last in words if text.strip()]


def _unspaced(text: str) -> bool:
    return bool(text) and unicodedata.name(text[0], "").split(" ")[0] in _UNSPACED


def warp(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cheapest path through `cost` `[rows, columns]` as row and column numbers.

    Each step goes one row down, one column on, or both; every row and column is met. It takes
    rows + columns steps of numpy along the anti-diagonals. The cost of a step along the row is its
    cell's, as of the others.

    >>> rows, columns = warp(np.array([[0.0, 9, 9], [9, 0, 0]]))
    >>> rows.tolist(), columns.tolist()
    ([0, 1, 1], [0, 1, 2])
    """
    rows, columns = cost.shape
    if not rows or not columns:
        raise InputError("there is nothing to align: the transcript or the sound is empty")
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((rows + 1, columns + 1), np.int8)
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        options = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        best = options.argmin(0)  # on a tie both, then down
        total[i, j] = cost[i - 1, j - 1] + np.take_along_axis(options, best[None], 0)[0]
        came[i, j] = best
    path = [(rows, columns)]
    while path[-1] != (1, 1):
        i, j = path[-1]
        step = came[i, j]
        path.append((i - (step != 2), j - (step != 1)))
    steps: np.ndarray = np.array(path[::-1]) - 1
    return steps[:, 0], steps[:, 1]


def median(rows: Tensor, width: int = FILTER) -> Tensor:
    """Return the median over `width` neighbours along the last axis, its ends mirrored."""
    if width % 2 == 0 or width < 1:
        raise InputError(f"the width of a median filter is odd, not {width}")
    half = width // 2
    if half == 0 or rows.shape[-1] <= half:
        return rows
    flat = rows.reshape(1, -1, rows.shape[-1])
    padded = torch.nn.functional.pad(flat, (half, half), mode="reflect")
    return padded.unfold(-1, width, 1).median(-1).values.reshape(rows.shape)


def starts(rows: Tensor, width: int = FILTER) -> np.ndarray:
    """Return the frame at which each row begins, by warping over several heads.

    `rows` is `[heads, rows, frames]`, the attention of the alignment heads over the real frames.
    Each frame is standardised over the rows, filtered along time, and averaged over the heads.

    Deviations from OpenAI's code: rows are shares of the real frames (theirs is a softmax over
    them, which is the same), and a frame with the same value in every row counts 0, not NaN.
    """
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-12)
    mean = rows.mean(-2, keepdim=True)
    spread = rows.std(-2, keepdim=True, unbiased=False)
    scaled = torch.where(spread > 0, (rows - mean) / spread.clamp_min(1e-12), 0.0)
    # The filter makes `width` copies of what it is given: a few rows at a time.
    filtered = [median(part, width).mean(0) for part in scaled.split(BLOCK, -2)]
    matrix = torch.cat(filtered).double().cpu().numpy()
    at, when = warp(-matrix)
    return when[np.concatenate([[True], np.diff(at) > 0])]


def spearman(values: Tensor) -> Tensor:
    """Return the rank correlation of `[..., items]` with their order, 0 where all are equal.

    >>> spearman(torch.tensor([[1.0, 3, 7], [3, 2, 1]])).tolist()
    [1.0, -1.0]
    """
    count = values.shape[-1]
    if count < 2:
        return torch.zeros(values.shape[:-1])
    values = values.double()
    below = (values[..., :, None] > values[..., None, :]).sum(-1)
    same = (values[..., :, None] == values[..., None, :]).sum(-1)
    ranks = below + (same - 1) / 2.0
    ranks = ranks - ranks.mean(-1, keepdim=True)
    order = torch.arange(count, dtype=torch.float64, device=values.device) - (count - 1) / 2
    size = ranks.square().sum(-1).sqrt() * order.square().sum().sqrt()
    return (
        torch.where(size > 0, (ranks * order).sum(-1) / size.clamp_min(1e-12), 0.0)
        .float()
        .clamp(-1, 1)
    )


def word_errors(reference: str, heard: str) -> tuple[int, int]:
    """Return the word edits from `said` to `heard` and the words of `said`; their ratio is the
    word error rate. Case and punctuation do not count.

    >>> word_errors("The sea, the shore.", "the see the shore now")
    (2, 4)
    """

    def plain(text: str) -> list[str]:
        kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
        return kept.split()

    want, got = plain(reference), plain(heard)
    row = list(range(len(got) + 1))
    for i, word in enumerate(want, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1], len(want)
