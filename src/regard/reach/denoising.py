"""Where an attention call stands in the making of an image, and which words its text keys are."""

from __future__ import annotations

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
class Prompts:
    """What a pipeline encoded for the images it makes now.

    Attributes:
        texts: the prompts, None when the pipeline was given ready embeddings.
        embeds: `[prompts * images_per_prompt, tokens, dim]`, as they reach the denoiser.
        images_per_prompt: rows of one prompt stand together.
        encode: texts -> `[texts, tokens, dim]`, by the pipeline's own encoder and its settings.
        tokenizers: tokenizer and first key column of each text encoder: one after the other in
            SD3, where a word has columns in both.
    """

    texts: list[str] | None
    embeds: Tensor
    images_per_prompt: int
    encode: Callable[[list[str]], Tensor] = field(repr=False)
    tokenizers: tuple[tuple[Any, int, int], ...] = field(repr=False)

    def text(self, element: int) -> str:
        """The prompt of a row of the batch (of its conditional half)."""
        if self.texts is None:
            raise InputError(
                "the pipeline was given prompt_embeds, so its words are not known: give it the "
                "prompt as text"
            )
        return self.texts[element // self.images_per_prompt]

    def columns(self, element: int, start: int, end: int) -> list[int]:
        """Key columns of the characters `start` to `end` of a row's prompt.

        Raises:
            InputError: the text encoder cuts them off.
        """
        text = self.text(element)
        found: list[int] = []
        for tokenizer, first, room in self.tokenizers:
            spans = token_spans(tokenizer, text)
            own = [n for n, (a, b) in enumerate(spans) if a < end and b > start]
            if any(n >= room - 1 for n in own) or not own:
                raise InputError(
                    f"{text[start:end]!r} lies behind the {room} tokens that the text encoder "
                    "reads: shorten the prompt, or bring it forward"
                )
            found += [first + n for n in own]
        return found


def token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """First character and end of every token of the whole text, `(0, 0)` for special tokens."""
    try:
        given = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        spans = given["offset_mapping"]
    except (NotImplementedError, KeyError, TypeError):
        raise ReachError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text: load the "
            "pipeline with its fast tokenizer"
        ) from None
    return [(int(a), int(b)) for a, b in spans]


@dataclass(frozen=True, eq=False)
class Denoising:
    """Where a call stands: which step, which rows the prompt drives, which tokens are the image.

    Attributes:
        run: how many images or batches the pipeline began before this one in the session.
        step: forwards of the denoiser in this run, from 0; the two halves of guidance are one.
        timestep: the time that the denoiser was given.
        rows: boolean `[batch]`, true where the prompt drives the row, false where guidance runs
            without it; None when a denoiser without its pipeline got what looks like both halves.
        index: the numbers of the true rows; the same tensor through one forward.
        grid: height and width of the image tokens; None when they form no grid.
        image: the image tokens among the queries (and, in self and joint attention, the keys).
        text: the text tokens among the keys, None in self-attention.
        prompts: what the pipeline encoded, None without a pipeline.
        project: another text context `[rows, tokens, dim]` -> the keys and values that this module
            makes of it, `[rows, heads, tokens, head_dim]`, by the very processor that runs;
            cross-attention only.
    """

    run: int
    step: int
    timestep: float
    rows: Tensor | None
    index: Tensor | None = field(repr=False)
    grid: tuple[int, int] | None
    image: slice
    text: slice | None
    prompts: Prompts | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

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
    q, k, lse = call.q[:, :, place.image], call.k, state.lse[:, :, place.image]
    if call.heads is not None or call.bias is not None or call.softcap is not None:
        raise ReachError(f"columns of {call.site.name} under another method are not measured yet")
    if rows is not None:
        q, k, lse = q[rows], k[rows], lse[rows]
    wanted = torch.as_tensor(keys, device=k.device) + first
    if wanted.dim() == 1:
        wanted = wanted.expand(len(k), -1)
    dtype = lse.dtype
    chosen = k.gather(2, wanted[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    if chosen.shape[1] != q.shape[1]:
        chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
    scores = call.scale * (q.to(dtype) @ chosen.to(dtype).transpose(-1, -2))
    return (scores - lse[..., None]).exp()
