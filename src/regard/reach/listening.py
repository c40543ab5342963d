"""What a pipeline makes of its prompts: their texts, tokens and encodings, learnt as it works.

A session listens to the pipeline's own `encode_prompt`, and during it to the tokenizers: what each
was given (another `prompt_2`, a chat template around the words) and which tokens it gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoising import Prompts, Reader
from .layouts import family

_NUMBERED = ("prompt", "prompt_2", "prompt_3", "prompt_4")
_READY = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True)
class Heard:
    """One text that a tokenizer was given, and its tokens; so many of them are padding in front."""

    text: str
    ids: tuple[int, ...]
    special: bool
    lead: int


@dataclass(eq=False)
class Encoding:
    """One call of `encode_prompt`.

    Attributes:
        prompts: the texts and their columns.
        rows: `[tokens, dim]` of every row that the prompt drives.
        others: the same without the prompt (the negative one), as far as the call made them.
    """

    prompts: Prompts
    rows: list[Tensor]
    others: list[Tensor]


def listen(pipeline: Any, denoiser: Any, tell: Callable[[Encoding], None]) -> Callable[[], None]:
    """Tell of every encoding until the answer is called."""
    if not hasattr(pipeline, "encode_prompt") or "encode_prompt" in vars(pipeline):
        return lambda: None
    plain = pipeline.encode_prompt
    signature = inspect.signature(plain)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        # some pipelines write their template into the very list that they are given
        given = {
            name: list(value) if isinstance(value, list) else value
            for name, value in signature.bind(*args, **kwargs).arguments.items()
        }
        with _hearing(pipeline) as heard:
            out = plain(*args, **kwargs)
        encoding = _encoding(pipeline, denoiser, plain, given, out, heard)
        if encoding is not None:
            tell(encoding)
        return out

    pipeline.encode_prompt = encode_prompt
    return lambda: vars(pipeline).pop("encode_prompt", None)


@contextmanager
def _hearing(pipeline: Any) -> Iterator[dict[str, list[Heard]]]:
    """Note what the pipeline's tokenizers are given; each is as it was afterwards."""
    heard: dict[str, list[Heard]] = {}
    changed: list[tuple[Any, type]] = []
    try:
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"):
            tokenizer = getattr(pipeline, name, None)
            if tokenizer is None or any(tokenizer is t for t, _ in changed):
                continue
            plain = type(tokenizer)
            changed.append((tokenizer, plain))
            # a call looks at the class alone
            tokenizer.__class__ = _hearer(plain, heard.setdefault(name, []))
        yield heard
    finally:
        for tokenizer, plain in changed:
            tokenizer.__class__ = plain


def _hearer(plain: type, heard: list[Heard]) -> type:
    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        out = plain.__call__(self, text, *args, **kwargs)
        try:
            rows, texts = out["input_ids"], [text] if isinstance(text, str) else list(text)
            rows = rows.tolist() if isinstance(rows, Tensor) else rows
            rows = [rows] if rows and not isinstance(rows[0], (list, tuple)) else rows
            special = bool(kwargs.get("add_special_tokens", True))
            masks = out.get("attention_mask", rows)
            masks = masks.tolist() if isinstance(masks, Tensor) else masks
            masks = [masks] if masks and not isinstance(masks[0], (list, tuple)) else masks
            for prompt, ids, mask in zip(texts, rows, masks, strict=True):
                lead = next((n for n, m in enumerate(mask) if m), 0) if masks is not rows else 0
                heard.append(Heard(prompt, tuple(ids), special, lead))
        except (TypeError, KeyError, ValueError):
            pass  # no plain texts: nothing that words could be found in
        return out

    return type(plain.__name__, (plain,), {"__call__": call, "__module__": plain.__module__})


def _encoding(
    pipeline: Any,
    denoiser: Any,
    plain: Callable[..., Any],
    given: dict[str, Any],
    out: Any,
    heard: dict[str, list[Heard]],
) -> Encoding | None:
    outs = out if isinstance(out, (tuple, list)) and not _listed(out) else (out,)
    rows = _rows(outs[0])
    if rows is None:
        return None
    others = [r for o in outs[1:] for r in (_rows(o) or []) if _like(r, rows[0])]
    texts = given.get("prompt")
    if given.get("prompt_embeds") is not None:
        texts = None
    texts = [texts] if isinstance(texts, str) else texts
    images = int(given.get("num_images_per_prompt") or given.get("num_videos_per_prompt") or 1)

    def encode(new: list[str]) -> Tensor:
        changed: dict[str, Any] = {"prompt": list(new)}
        for name in (*_NUMBERED[1:], *_READY):
            if name in given:
                changed[name] = None
        for name in ("negative_prompt", *(f"negative_{n}" for n in _READY)):
            if name in given:
                changed[name] = None
        if "do_classifier_free_guidance" in inspect.signature(plain).parameters:
            changed["do_classifier_free_guidance"] = False
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            if name in inspect.signature(plain).parameters:
                changed[name] = 1
        embeds = plain(**{**given, **changed})
        embeds = embeds[0] if isinstance(embeds, (tuple, list)) else embeds
        assert isinstance(embeds, Tensor)
        return embeds

    readers: tuple[Reader, ...] = ()
    if texts is not None:
        # tokens of a textual inversion stand for several
        convert = getattr(pipeline, "maybe_convert_prompt", None)
        first = getattr(pipeline, "tokenizer", None)
        if convert is not None and first is not None:
            texts = [convert(text, first) for text in texts]
        listed = not isinstance(outs[0], Tensor)
        readers = _readers(pipeline, denoiser, given, list(texts), heard, rows, listed)
        if readers:  # the words that speak through keys: Flux reads those of its second prompt
            texts = list(readers[0].prompts)
    embeds = outs[0] if isinstance(outs[0], Tensor) else rows[0][None]
    prompts = Prompts(None if texts is None else list(texts), embeds, images, encode, readers)
    return Encoding(prompts, rows, others)


def _listed(out: Any) -> bool:
    """Whether this is one encoding for each prompt, not several results."""
    return isinstance(out, list) and all(isinstance(o, Tensor) and o.dim() == 2 for o in out)


def _rows(out: Any) -> list[Tensor] | None:
    """`[tokens, dim]` of every row, of a tensor or of a list of them."""
    if isinstance(out, Tensor) and out.dim() == 3 and out.is_floating_point():
        return list(out)
    if isinstance(out, (list, tuple)) and out and all(isinstance(o, Tensor) for o in out):
        return [o for o in out if o.dim() == 2 and o.is_floating_point()] or None
    return None


def _like(row: Tensor, other: Tensor) -> bool:
    return row.shape[-1] == other.shape[-1]


def _readers(
    pipeline: Any,
    denoiser: Any,
    given: dict[str, Any],
    texts: list[str],
    heard: dict[str, list[Heard]],
    rows: list[Tensor],
    listed: bool,
) -> tuple[Reader, ...]:
    """Each tokenizer with the text it read and the key columns that its tokens became."""
    known = family(denoiser)
    groups = (("tokenizer", "tokenizer_2"),) if known is None else known.encoders
    total = max(len(row) for row in rows)
    several = len(known.text) if known is not None else 1
    first = 0
    readers: list[Reader] = []
    for n, group in enumerate(groups):
        names = [name for name in group if heard.get(name)]
        if not names:
            continue
        inputs = {name: _read_for(pipeline, name, given, texts, heard[name]) for name in names}
        length = max(len(h.ids) for h in inputs[names[0]][1])
        last = n == len(groups) - 1 and several == 1
        width = total - first if last or (n == 0 and several > 1) else length
        for name in names:
            prompts, read = inputs[name]
            longest = max(len(h.ids) for h in read)
            # of a tensor the template before the words was cut off, of a list the padding behind
            skip = 0 if listed else max(0, longest - width)
            if known is not None and known.left:  # the pipeline pads in front, by itself
                skip = longest - width
            tokenizer = getattr(pipeline, name)
            readers.append(
                Reader(
                    tokenizer,
                    first,
                    width,
                    skip,
                    tuple(prompts),
                    tuple(h.text for h in read),
                    tuple(h.ids for h in read),
                    tuple(h.lead for h in read),
                    read[0].special,
                )
            )
        first += width
    return tuple(readers)


def _read_for(
    pipeline: Any, name: str, given: dict[str, Any], texts: list[str], heard: list[Heard]
) -> tuple[list[str], list[Heard]]:
    """The prompts that a tokenizer is for, and what it was given for each."""
    number = 0 if name == "tokenizer" else int(name[-1]) - 1
    prompts = given.get(_NUMBERED[number]) if number else None
    prompts = [prompts] if isinstance(prompts, str) else prompts
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    if prompts and convert is not None:
        prompts = [convert(text, getattr(pipeline, name)) for text in prompts]
    prompts = list(prompts) if prompts else texts
    read = []
    for n, prompt in enumerate(prompts):
        plain = prompt.strip().lower()
        # the shortest, as another prompt may hold this one
        holding = sorted(
            (h for h in heard if plain and plain in h.text.lower()), key=lambda h: len(h.text)
        )
        read.append(holding[0] if holding else heard[min(n, len(heard) - 1)])
    return prompts, read


def same(row: Tensor, other: Tensor) -> bool:
    """Whether two encodings are the same, but for the dtype that the pipeline brings them to."""
    return row.shape == other.shape and torch.equal(row, other.to(row))
