"""Encodings of a prompt with learnt input embeddings in place of some of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .inversion import encode_text


def encode_with(pipe: Any, prompt: str, at: Sequence[int], rows: Tensor) -> Tensor:
    """A prompt's encoding, `[1, tokens, dim]`, with other input embeddings in some columns.

    The rows, `[columns, dim]`, are put in while the text encoder runs; gradients reach them.

    >>> from torch import zeros
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> encode_with(tiny_pipeline("sd"), "a red circle", [3], zeros(1, 32)).shape
    torch.Size([1, 24, 32])
    """

    def put(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, list(at)] = rows.to(out)
        return out

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
    try:
        return encode_text(pipe, prompt)
    finally:
        hook.remove()
