"""Rows of a data set: every image of a prompt with the maps of its caption's noun chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from regard.report.contact import png

from .method import Recipe, described, draw
from .prompts import Chunk, Prompt, chunks, clean, seed_of

STATISTICS = ("least", "greatest", "sum", "x", "y", "xx", "yy", "xy")
_NEEDS = 'data sets need the library datasets: pip install "regard[data]"'


def features() -> Any:
    """The columns of a build, as `datasets.Features`.

    Raises:
        ImportError: datasets is not installed.
    """
    try:
        from datasets import Features, Image, List, Value
    except ImportError:
        raise ImportError(_NEEDS) from None
    return Features(
        {
            "prompt": Value("string"),
            "caption": Value("string"),
            "source": Value("string"),
            "licence": Value("string"),
            "number": Value("int32"),
            "seed": Value("int64"),
            "image": Image(),
            "chunks": List(
                {
                    "text": Value("string"),
                    "root": Value("string"),
                    "start": Value("int32"),
                    "end": Value("int32"),
                    "tokens": List(Value("int32")),
                    "cut": Value("bool"),
                    "map": List(List(Value("float16"))),
                    **{name: Value("float32") for name in STATISTICS},
                }
            ),
        }
    )


def rows(
    pipe: Any,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    rewrite: Callable[[str], str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """The rows of some prompts: every image with the maps of its caption's chunks."""
    made = []
    for prompt in prompts:
        caption = clean(prompt.text)
        caption = rewrite(caption).strip() if rewrite is not None else caption
        parts = chunks(caption, recipe.parser)
        for first in range(0, recipe.images, recipe.batch):
            numbers = range(first, min(first + recipe.batch, recipe.images))
            images, maps, seen = draw(pipe, caption, parts, numbers, recipe)
            for n, number in enumerate(numbers):
                made.append(
                    {
                        "prompt": prompt.text,
                        "caption": caption,
                        "source": prompt.source,
                        "licence": prompt.licence,
                        "number": number,
                        "seed": seed_of(caption, number, recipe.seed),
                        "image": {"bytes": png(images[n]), "path": None},
                        "chunks": [
                            _chunk(part, maps[n, at], seen.cut[at], seen.tokens[at])
                            for at, part in enumerate(parts)
                        ],
                    }
                )
        advance()
    return made


def _chunk(chunk: Chunk, values: Tensor, cut: bool, tokens: list[int]) -> dict[str, Any]:
    sound = not cut and bool(torch.isfinite(values).all())
    return {
        **asdict(chunk),
        "tokens": tokens,
        "cut": cut,
        "map": values.half().tolist() if sound else None,
        **(described(values) if sound else dict.fromkeys(STATISTICS)),
    }
