"""Prompt-to-Prompt: an edited image that looks where the source image looked.

Paper: "Prompt-to-Prompt Image Editing with Cross Attention Control", Hertz et al., 2022, arXiv
2208.01626. Two images are made from one noise, the source's and the edit's; for the first steps the
edit's cross-attention takes the source's maps, column by column.

All edits of maps are linear in the columns, so they go over to the values and no map is made: the
edit's output is `P_source (A V) + P_edit (b V)`, two fused calls, where `A` says which source
column each text token of the edit takes and `b` how much of its own it keeps. Self-attention takes
the source's queries and keys.

Deviations:
- Words are found by the tokenizer's character offsets, not by splitting at spaces and counting
  pieces.
- Padding takes the padding of the source, column by column, as released.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError, nearest
from regard.reach.call import Call, Handler, Site
from regard.reach.denoising import columns, denoising, token_spans

SELF_CELLS = 256  # self-attention above 16 x 16 is the edit's own


def align(source: Sequence[int], target: Sequence[int]) -> list[int | None]:
    """For every target token the source token it goes with, None for one that is new.

    Needleman-Wunsch with match 1, mismatch -1 and gap 0, as released: what differs is never paired.

    >>> align([0, 5, 6, 9], [0, 5, 7, 6, 9])
    [0, 1, None, 2, 3]
    """
    rows, columns_ = len(source), len(target)
    best = [[0] * (columns_ + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns_ + 1):
            pair = best[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            best[i][j] = max(pair, best[i][j - 1], best[i - 1][j])
    matches: list[int | None] = [None] * columns_
    i, j = rows, columns_
    while i and j:
        same = source[i - 1] == target[j - 1]
        if same and best[i][j] == best[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            matches[j] = i
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i -= 1
    return matches


def word_span(prompt: str, words: str) -> tuple[int, int]:
    """First character and end of a word or phrase of a prompt; "circle (2)" is the second circle.

    Raises:
        InputError: the prompt does not have it, or has it more than once.

    >>> word_span("a carpet and a Car", "car")
    (15, 18)
    """
    asked = re.fullmatch(r"(.+?)\s*\((\d+)\)", words.strip())
    name, number = (asked[1], int(asked[2])) if asked else (words.strip(), None)
    pattern = rf"(?<!\w){re.escape(name)}(?!\w)" if name else r"(?!)"
    spans = [m.span() for m in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not spans or (number is not None and not 1 <= number <= len(spans)):
        known = re.findall(r"\w+", prompt)
        raise InputError(f"{words!r} is not in {prompt!r}.{nearest(name, known)}")
    if number is None and len(spans) > 1:
        raise InputError(
            f"{name!r} stands {len(spans)} times in {prompt!r}: say which, as '{name} (2)'"
        )
    return spans[(number or 1) - 1]


def word_columns(tokenizer: Any, prompt: str, words: str) -> list[int]:
    """Columns of a word or phrase of a prompt; "circle (2)" is the second circle.

    Raises:
        InputError: the prompt does not have it, has it more than once, or it is cut off.

    >>> from regard.zoo.tiny_diffusion import clip_tokenizer
    >>> word_columns(clip_tokenizer(), "a red circle and a blue square", "blue square")
    [6, 7]
    """
    return span_columns(tokenizer, prompt, *word_span(prompt, words))


def span_columns(tokenizer: Any, prompt: str, start: int, end: int) -> list[int]:
    """Columns of the characters `start` to `end` of a prompt.

    Raises:
        InputError: they are cut off.
    """
    columns = [
        n for n, (a, b) in enumerate(token_spans(tokenizer, prompt)) if a < end and b > start
    ]
    if not columns or columns[-1] >= tokenizer.model_max_length - 1:
        raise InputError(
            f"{prompt[start:end]!r} lies behind the {tokenizer.model_max_length} tokens that the "
            "text encoder reads: shorten the prompt"
        )
    return columns


def token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt with the special ones, without padding, cut at the encoder's length."""
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    return [int(n) for n in ids]


def of_row(call: Call, row: int, value: Tensor) -> Call:
    """One row's queries and keys over other values `[1, heads, keys, dim]`."""
    rows = slice(row, row + 1)
    bias = call.bias[rows] if call.bias is not None and len(call.bias) > 1 else call.bias
    return call.change(q=call.q[rows], k=call.k[rows], v=value, bias=bias, live=None)


@dataclass(frozen=True, eq=False)
class Columns:
    """What each text column of the edit is made of.

    Attributes:
        take: `[source columns, edit columns]`, shares of the source's columns.
        keep: `[edit columns]`, share of its own column.
    """

    take: Tensor
    keep: Tensor

    def of(self, source: Tensor, edit: Tensor) -> Tensor:
        """The edited maps of explicit ones, `[..., columns]`."""
        return source @ self.take.to(source) + edit * self.keep.to(edit)

    def over(self, call: Call, source: int, edit: int) -> Tensor:
        """The edited maps over the edit's values, `[1, heads, queries, dim]`: no map is made.

        Args:
            call: cross-attention of a batch that holds both images.
            source, edit: their rows.

        Raises:
            InputError: the columns are those of another tokenizer.
        """
        value = call.v[edit : edit + 1]
        take, keep = self.take.to(value), self.keep.to(value)
        if len(take) != call.k.shape[2]:
            raise InputError(
                f"the edit has {len(take)} columns and the text {call.k.shape[2]}: make it with "
                "this pipeline's tokenizer"
            )
        out = of_row(call, source, take @ value).attend().out
        if bool(keep.any()):
            out = out + of_row(call, edit, keep[:, None] * value).attend().out
        return out

    def scaled(self, tokenizer: Any, prompt: str, weights: Mapping[str, float]) -> Columns:
        """The same with the columns of some words of the edit multiplied, nothing renormalised."""
        factor = torch.ones_like(self.keep)
        for word, weight in weights.items():
            factor[word_columns(tokenizer, prompt, word)] = weight
        return Columns(self.take * factor, self.keep * factor)


def swapped(tokenizer: Any, source: str, target: str) -> Columns:
    """Word-Swap: every column is the source's; a word of more or fewer pieces shares its columns.

    Raises:
        InputError: the prompts have different numbers of words.

    >>> from regard.zoo.tiny_diffusion import clip_tokenizer
    >>> made = swapped(clip_tokenizer(), "a red circle", "a red square")
    >>> bool((made.take == torch.eye(24)).all()), float(made.keep.sum())
    (True, 0.0)
    """
    source_words, target_words = source.split(), target.split()
    if len(source_words) != len(target_words):
        raise InputError(
            f"a word swap needs as many words on both sides, not {len(source_words)} and "
            f"{len(target_words)}: refine the prompt instead"
        )
    length = tokenizer.model_max_length
    take, keep = torch.zeros(length, length), torch.zeros(length)
    pairs = zip(_words(tokenizer, source), _words(tokenizer, target))
    take[0, 0] = 1.0
    a = b = 1
    for first, second in pairs:
        if len(first) == len(second):
            for n, m in zip(first, second):
                take[n, m] = 1.0
        else:
            take[torch.tensor(first)[:, None], torch.tensor(second)] = 1 / len(second)
        a, b = first[-1] + 1, second[-1] + 1
    # the end of the text and the padding follow, one by one
    for m in range(b, length):
        take[min(a + m - b, length - 1), m] = 1.0
    return Columns(take, keep)


def _words(tokenizer: Any, prompt: str) -> list[list[int]]:
    return [span_columns(tokenizer, prompt, *m.span()) for m in re.finditer(r"\S+", prompt)]


def refined(tokenizer: Any, source: str, target: str) -> Columns:
    """Refinement: tokens that both prompts have take the source's column, new ones their own.

    >>> from regard.zoo.tiny_diffusion import clip_tokenizer
    >>> refined(clip_tokenizer(), "a circle", "a red circle").keep[:5].tolist()
    [0.0, 0.0, 1.0, 0.0, 0.0]
    """
    length = tokenizer.model_max_length
    source_ids, target_ids = token_ids(tokenizer, source), token_ids(tokenizer, target)
    take, keep = torch.zeros(length, length), torch.zeros(length)
    for m, n in enumerate(align(source_ids, target_ids)):
        if n is None:
            keep[m] = 1.0
        else:
            take[n, m] = 1.0
    for m in range(len(target_ids), length):
        take[m, m] = 1.0
    return Columns(take, keep)


@dataclass(eq=False)
class PromptToPrompt(Handler):
    """Let the second image of a pair look where the first looks, for a number of steps.

    The pipeline makes two images in one batch, the source's first, from the same noise; only the
    rows that the prompt drives are changed. With `cross_steps=0` and `self_steps=0` both images are
    the plain ones.

    Args:
        edit: from `swapped` or `refined`.
        cross_steps: steps in which cross-attention takes the source's columns.
        self_steps: steps in which self-attention takes the source's maps.
        self_cells: self-attention of more image tokens stays the edit's own.
        blend: key columns (of the source, of the edit) of the words that may change; elsewhere the
            latents are the source's. None changes them everywhere.
        threshold: share of its maximum from which on a map counts.
        blend_cells: maps of the largest grid with at most so many tokens are used.

    Use `after_step` as that of `regard.parts.diffusion.inversion.replay` for the blend.

    >>> from regard.parts.diffusion.inversion import encode_text, replay
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> words = ["a red circle", "a red square"]
    >>> text = torch.cat([encode_text(pipe, w) for w in words]).detach()
    >>> empty = encode_text(pipe, "").detach()
    >>> one = PromptToPrompt(swapped(pipe.tokenizer, *words), cross_steps=2, self_steps=1)
    >>> noise = torch.randn(1, 4, 16, 16)
    >>> replay(pipe, noise, [text] * 2, [empty] * 2, handlers=[one]).shape
    torch.Size([2, 4, 16, 16])

    Raises:
        ReachError: a model without cross-attention to text.
        InputError: not two images.
    """

    edit: Columns
    cross_steps: int
    self_steps: int
    self_cells: int = SELF_CELLS
    blend: tuple[Sequence[int], Sequence[int]] | None = None
    threshold: float = 0.3
    blend_cells: int = SELF_CELLS
    _sums: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    mask: Tensor | None = field(default=None, init=False, repr=False)

    def sites(self, sites: list[Site]) -> list[Site]:
        if not any(s.kind == "cross" for s in sites) or any(s.kind == "joint" for s in sites):
            raise ReachError(
                "Prompt-to-Prompt acts on cross-attention to text, and this model has none: use a "
                "Stable Diffusion 1, 2 or XL pipeline"
            )
        self._sums, self.mask = {}, None
        return sites

    def _pair(self, call: Call) -> tuple[int, int]:
        rows = denoising(call).conditional.tolist()
        if len(rows) != 2:
            raise InputError(
                f"Prompt-to-Prompt changes the second of two images, and there are {len(rows)}: "
                "make the source's and the edit's in one batch"
            )
        return rows[0], rows[1]

    def before(self, call: Call) -> Call | None:
        place = denoising(call)
        replaced = place.step < self.self_steps and call.q.shape[2] <= self.self_cells
        if call.site.kind != "self" or not replaced:
            return None
        source, edit = self._pair(call)
        q, k = call.q.clone(), call.k.clone()
        q[edit], k[edit] = q[source], k[source]
        return call.change(q=q, k=k)

    def after(self, call: Call, state: State) -> State | None:
        if call.site.kind != "cross":
            return None
        source, edit = self._pair(call)
        active = denoising(call).step < self.cross_steps
        if self.blend is not None:
            self._look(call, state, source, edit, active)
        if not active:
            return None
        whole = state.out.clone()
        whole[edit] = self.edit.over(call, source, edit)[0]
        return State(whole, state.lse)

    def _look(self, call: Call, state: State, source: int, edit: int, active: bool) -> None:
        """Add up the maps of the words that may change, as the edit leaves them."""
        assert self.blend is not None
        grid = denoising(call).grid
        if grid is None or grid[0] * grid[1] > self.blend_cells:
            return
        rows = torch.tensor([source, edit], device=call.k.device)
        maps = columns(call, state, range(call.k.shape[2]), rows).mean(1)
        second = self.edit.of(maps[0], maps[1]) if active else maps[1]
        both = [m[:, list(w)].sum(-1) for m, w in zip((maps[0], second), self.blend)]
        now = torch.stack(both).unflatten(1, grid).float()
        self._sums[grid] = self._sums[grid] + now if grid in self._sums else now

    def after_step(self, step: int, latents: Tensor) -> Tensor:
        """The edit's latents, and the source's where neither image looks at what may change."""
        if self.blend is None:
            return latents
        grid = max(self._sums, key=lambda g: g[0] * g[1])
        maps = torch.nn.functional.max_pool2d(self._sums[grid][None], 3, 1, 1)
        maps = torch.nn.functional.interpolate(maps, size=latents.shape[-2:])[0]
        high = maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        self.mask = (maps / high > self.threshold).any(0)
        edit = torch.where(self.mask, latents[1], latents[0])
        return torch.stack([latents[0], edit])
