"""Where an attention call stands in the making of an image, and which words its text keys are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError

if TYPE_CHECKING:
    from .call import Call


@dataclass(frozen=True, eq=False)
class Reader:
    """A tokenizer, what it read, and the key columns that its tokens became.

    Attributes:
        first: its first key column, counted from the first text key.
        width: how many columns it has.
        skip: tokens of a template before the words, which reach no key.
        prompts: the text of each prompt as a person gave it to this encoder.
        texts: the same as the tokenizer got it, a template around it.
        ids: its tokens of each prompt, cut off where the encoder ends.
        leads: how many of them are padding in front.
        special: whether it added its special tokens itself.
    """

    tokenizer: Any = field(repr=False)
    first: int
    width: int
    skip: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    leads: tuple[int, ...]
    special: bool = True

    def columns(self, number: int, start: int, end: int) -> list[int] | None:
        """Key columns of the characters `start` to `end` of prompt `number` as it was given to this
        encoder; None where some of them lie behind what it reads.
        """
        spans, ids = self.spans(number)
        lead = self._lead(number)
        tokens = [n for n, (a, b) in enumerate(spans) if a < end + lead and b > start + lead]
        padding = self.leads[number]
        read = self.ids[number][padding:]
        columns = [n + padding - self.skip for n in tokens]
        kept = [0 <= c < self.width and n < len(read) for n, c in zip(tokens, columns)]
        if not tokens or not all(kept) or any(read[n] != ids[n] for n in tokens):
            return None
        return [self.first + c for c in columns]

    def spans(self, number: int) -> tuple[list[tuple[int, int]], list[int]]:
        """First character and end of every token of the text as it was read, and the tokens."""
        return _tokens(self.tokenizer, self.texts[number], self.special)

    def _lead(self, number: int) -> int:
        """Characters of the text as it was read that stand before the prompt."""
        prompt, text = self.prompts[number], self.texts[number]
        at = text.rfind(prompt)
        if at < 0:  # some pipelines lower the case, and strip what stands around
            at = text.lower().rfind(prompt.strip().lower())
            at -= len(prompt) - len(prompt.lstrip()) if at >= 0 else 0
        if at < 0 and prompt.strip():
            raise InputError(
                f"the pipeline rewrote the prompt into {text!r}, so its words cannot be found: "
                "name key columns with tokens={...}"
            )
        return at


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a pipeline encoded for the images it makes now.

    Attributes:
        texts: the prompts (of the encoder whose columns come first), None when the pipeline was
            given ready embeddings.
        embeds: `[prompts * images_per_prompt, tokens, dim]`, as they reach the denoiser.
        images_per_prompt: rows of one prompt stand together.
        encode: texts -> `[texts, tokens, dim]`, by the pipeline's own encoder and its settings.
        readers: the text encoders that speak through keys, each with the text it read: one after
            the other in SD3, where a word has columns in both.
    """

    texts: list[str] | None
    embeds: Tensor
    images_per_prompt: int
    encode: Callable[[list[str]], Tensor] = field(repr=False)
    readers: tuple[Reader, ...] = field(repr=False)

    def text(self, element: int) -> str:
        """The prompt of a row of the batch (of its conditional half)."""
        if self.texts is None:
            raise InputError(
                "the pipeline was given prompt_embeds, so its words are not known: give it the "
                "prompt as text"
            )
        return self.texts[element // self.images_per_prompt]

    def reads(self, element: int) -> list[str]:
        """Every text that some encoder reads for a row, each once."""
        number = element // self.images_per_prompt
        return list(dict.fromkeys([self.text(element), *(r.prompts[number] for r in self.readers)]))

    def columns(self, element: int, start: int, end: int, text: str | None = None) -> list[int]:
        """Key columns of the characters `start` to `end` of a row's prompt, or of another of the
        texts that are read for it.

        An encoder that reads another text has the words where they stand there, if they do.

        Raises:
            InputError: every text encoder cuts them off.
        """
        text = self.text(element) if text is None else text
        number = element // self.images_per_prompt
        phrase = text[start:end]
        turn = len(re.findall(rf"(?={re.escape(phrase)})", text[:start]))
        key_columns: list[int] = []
        room = 0
        for reader in self.readers:
            at, prompt = start, reader.prompts[number]
            if prompt != text:
                hits = [m.start() for m in re.finditer(rf"\b{re.escape(phrase)}\b", prompt)]
                if not hits:
                    continue
                at = hits[min(turn, len(hits) - 1)]
            room = max(room, reader.width)
            key_columns += reader.columns(number, at, at + end - start) or []
        if not key_columns:
            raise InputError(
                f"{phrase!r} lies behind the {room} tokens that the text encoder "
                "reads: shorten the prompt, or bring it forward"
            )
        return list(dict.fromkeys(key_columns))


def _tokens(
    tokenizer: Any, text: str, special: bool = True
) -> tuple[list[tuple[int, int]], list[int]]:
    try:
        given = tokenizer(
            text,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
            add_special_tokens=special,
        )
        spans = given["offset_mapping"]
    except (NotImplementedError, KeyError, TypeError):
        raise ReachError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text: load the "
            "pipeline with its fast tokenizer"
        ) from None
    return [(int(a), int(b)) for a, b in spans], list(given["input_ids"])


def token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """First character and end of every token of the whole text, `(0, 0)` for special tokens."""
    return _tokens(tokenizer, text)[0]


@dataclass(frozen=True, eq=False)
class Denoising:
    """Where a call stands: which step, which rows the prompt drives, which tokens are the image.

    Attributes:
        run: how many images or batches the pipeline began before this one in the session.
        step: steps of the sampler in this run, from 0. All forwards of a step have its number:
            the halves of guidance, the corrector of a second-order sampler, a perturbed pass.
        timestep: the time that the denoiser was given.
        rows: boolean `[batch]`, true where the prompt drives the row, false where guidance runs
            without it or perturbed; None when a denoiser without its pipeline got what looks like
            both halves.
        index: the numbers of the true rows; the same tensor through one forward.
        grid: height and width of the image tokens, frames before them in a video that is attended
            as a whole; None when they form no grid.
        image: the image tokens among the queries (and, in self and joint attention, the keys).
        text: the text tokens among the keys, None in self-attention.
        prompts: what the pipeline encoded, None without a pipeline.
        project: another text context `[rows, tokens, dim]` -> the keys and values that this module
            makes of it, `[rows, heads, tokens, head_dim]`, by the very processor that runs;
            cross-attention only.
        frames: rows of the call for one image or video: frames that are attended one by one.
        image_keys: the image tokens among the keys, None in cross-attention.
        text_queries: the text tokens among the queries, in joint attention.
        reference: the keys of pictures that the image refers to (Flux Kontext, Qwen-Image-Edit).
        unknown: why nobody knows which tokens are words; "" where that is known.
    """

    run: int
    step: int
    timestep: float
    rows: Tensor | None
    index: Tensor | None = field(repr=False)
    grid: tuple[int, ...] | None
    image: slice
    text: slice | None
    prompts: Prompts | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    frames: int = 1
    image_keys: slice | None = None
    text_queries: slice | None = None
    reference: slice | None = None
    unknown: str = ""

    @property
    def conditional(self) -> Tensor:
        """Indices of the rows that the prompt drives, `[elements]`: one for each image."""
        if self.index is None:
            raise InputError(
                "the batch holds every latent twice, as under classifier-free guidance, and a "
                "denoiser alone does not tell the halves apart: pass the whole pipeline instead"
            )
        return self.index


def denoising(call: Call) -> Denoising:
    """What is known of the denoiser's forward around a call.

    Raises:
        ReachError: the call comes from no denoiser.
    """
    if call.denoising is None:
        raise ReachError(
            f"{call.site.name} belongs to no denoiser: this needs a diffusion pipeline (or its "
            "UNet or transformer)"
        )
    return call.denoising


def columns(
    call: Call, state: State, keys: Sequence[int] | Tensor, rows: Tensor | None = None
) -> Tensor:
    """Exact attention of the image queries on chosen keys, `[rows, heads, image queries, keys]`.

    `exp(score - lse)` needs the scores of those keys alone, so no map of queries x keys is made.
    Float32 at least, differentiable through the scores and the lse.

    Args:
        keys: `[keys]`, or `[rows, keys]` where rows of the batch ask for other keys; text keys as
            `Prompts.columns` counts them (from the first text key).
        rows: rows of the batch; all when None.
    """
    place = denoising(call)
    first = place.text.start if place.text is not None else 0
    _plain(call)
    q, k, lse = call.q[:, :, place.image], call.k, state.lse[:, :, place.image]
    if rows is not None:
        q, k, lse = q[rows], k[rows], lse[rows]
    indices = torch.as_tensor(keys, device=k.device) + first
    if indices.dim() == 1:
        indices = indices.expand(len(k), -1)
    dtype = lse.dtype
    chosen = k.gather(2, indices[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    if chosen.shape[1] != q.shape[1]:
        chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
    scores = q.to(dtype) @ (call.scale * chosen.to(dtype)).transpose(-1, -2)
    if call.bias is not None:
        bias = _of_rows(call.bias, rows)[:, :, place.image]
        at = indices[:, None, None].expand(-1, bias.shape[1], bias.shape[2], -1)
        scores = scores + bias.expand(len(k), -1, -1, -1).gather(-1, at)
    weights = (scores - lse[..., None]).exp()
    size = (call.q.shape[2], call.k.shape[2])
    if not call.mask.is_full(*size):
        picked = indices if rows is None else indices.new_zeros(len(call.k), indices.shape[1])
        if rows is not None:
            picked[rows] = indices
        picked = picked[:, None].expand(-1, call.mask.heads, -1)
        seen = _of_rows(call.mask.columns(*size, picked), rows)[:, :, place.image]
        weights = torch.where(seen, weights, 0.0)
    return weights


def rows_of(
    call: Call, state: State, queries: Sequence[int] | Tensor, rows: Tensor | None = None
) -> Tensor:
    """Exact attention of chosen queries on all keys, `[rows, heads, queries, keys]`; as `columns`.

    Args:
        queries: `[queries]`, or `[rows, queries]`, counted from the first query of the call.
    """
    _plain(call)
    q, k, lse = (_of_rows(x, rows) for x in (call.q, call.k, state.lse))
    indices = torch.as_tensor(queries, device=q.device)
    if indices.dim() == 1:
        indices = indices.expand(len(q), -1)
    picked = q.gather(2, indices[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    lse = lse.gather(2, indices[:, None].expand(-1, lse.shape[1], -1))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = call.scale * (picked.to(lse.dtype) @ k.to(lse.dtype).transpose(-1, -2))
    at = indices[:, None, :, None].expand(-1, 1, -1, k.shape[2])
    if call.bias is not None:
        bias = _of_rows(call.bias, rows).expand(len(q), -1, -1, -1)
        scores = scores + bias.gather(2, at.expand(-1, bias.shape[1], -1, -1))
    weights = (scores - lse[..., None]).exp()
    size = (call.q.shape[2], call.k.shape[2])
    if not call.mask.is_full(*size):
        seen = _of_rows(call.mask.cells(*size, device=q.device), rows).expand(len(q), -1, -1, -1)
        weights = torch.where(seen.gather(2, at.expand(-1, seen.shape[1], -1, -1)), weights, 0.0)
    return weights


def _plain(call: Call) -> None:
    if call.heads is not None or call.softcap is not None:
        raise ReachError(f"columns of {call.site.name} under another method are not measured yet")


def _of_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of a tensor, or of one that all rows share."""
    return tensor if rows is None or len(tensor) == 1 else tensor[rows]
