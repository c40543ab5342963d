"""StableSemantics: data of prompts, captions, images, and one attention map for each noun chunk.

Paper: "StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations in
Naturalistic Images", Zawar et al., 2024, arXiv 2406.13735.

Every caption is drawn several times; while a stock pipeline draws, the attention of the image on
each noun chunk is summed over steps, resized, clamped at 0 and averaged over layers and heads (the
order of DAAM). Rows go into Parquet shards, each whole or not there, with checksums; a build that
was stopped goes on and ends with the same bytes.

Deviations. The paper's body was not at hand. Ours (reconstructed): the division by the number of
steps, a word's pieces averaged before its chunk's words (`average="tokens"` averages all pieces
alike, as DAAM does), determiners left out of the map, the size of the stored map. Rewriting prompts
to captions is a function of the user's: without one, a prompt cleaned of its markup is the caption.
Maps are attribution, not segmentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError
from regard.parts.text.expressions import words
from regard.reach import Call, Handler, Session, Site
from regard.reach.denoising import Prompts, columns, denoising

from .card import Settings
from .prompts import Chunk, seed_of

Recipe = Settings


@dataclass(eq=False)
class ChunkMaps(Handler):
    """One map for each span of the prompt, exact in the order of DAAM: the sum over steps of each
    layer and head is resized and clamped before layers and heads are averaged.

    Rows that the prompt does not drive stay out; a run of the pipeline replaces the last. Memory:
    `[images, heads, spans, height, width]` a layer, whatever the steps.

    Args:
        spans: for each span the groups of characters to average: words, or one group of all. In a
            batch of several prompts each prompt has its own words at these characters.
        recipe: grid, resize, finest.

    >>> import regard
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> seen = regard.ChunkMaps([[(2, 5), (6, 12)]], regard.Recipe(grid=16))
    >>> with regard.apply(pipe, seen):
    ...     _ = pipe("a red circle", num_inference_steps=2)
    >>> seen.maps().shape, seen.report()["spans"][0]["tokens"]
    (torch.Size([1, 1, 16, 16]), [2, 3])
    """

    spans: Sequence[Sequence[tuple[int, int]]]
    recipe: Recipe
    cut: list[bool] = field(default_factory=list, init=False)
    tokens: list[list[int]] = field(default_factory=list, init=False)
    _sums: dict[int, tuple[Tensor, int]] = field(default_factory=dict, init=False, repr=False)
    _layout: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _run: int = field(default=-1, init=False, repr=False)

    def sites(self, sites: list[Site]) -> list[Site]:
        reading = [s for s in sites if s.text]
        if not reading:
            raise ReachError("maps of noun chunks need a diffusion pipeline that looks at text")
        self._clear()
        self._run = -1
        return reading

    def _clear(self) -> None:
        self._sums, self._layout, self.cut, self.tokens = {}, None, [], []

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        if place.run != self._run:
            self._clear()
            self._run = place.run
        if place.unknown or place.frames > 1 or len(place.grid or (0, 0)) > 2:
            raise ReachError(
                f"{place.unknown or 'this is a video'}: maps of noun chunks are of pictures"
            )
        rows = place.conditional
        if not len(rows) or place.grid is None or not self.spans:
            return
        keys, weights, _ = self._columns(call, len(rows))
        with torch.no_grad():
            share = columns(call, state, keys.to(call.k.device), rows).float()
            maps = (share @ weights[:, None].to(share)).transpose(2, 3).unflatten(3, place.grid)
        total, count = self._sums.get(call.site.index, (None, 0))
        self._sums[call.site.index] = (maps if total is None else total + maps, count + 1)

    def _columns(self, call: Call, elements: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key columns of every image, their weights in every span, and which spans have any."""
        if self._layout is None:
            prompts = denoising(call).prompts
            if prompts is None:
                raise InputError("the prompt is not known: pass the whole pipeline")
            shares = [
                [self._weights(prompts, element, groups) for groups in self.spans]
                for element in range(elements)
            ]
            known = torch.tensor([[bool(w) for w in row] for row in shares])
            self.cut = (~known.any(0)).tolist()
            self.tokens = [sorted(w) for w in shares[0]]
            used = [sorted({c for w in row for c in w}) for row in shares]
            width = max(1, *map(len, used))
            keys = torch.zeros(elements, width, dtype=torch.long)
            weights = torch.zeros(elements, width, len(self.spans))
            for row, numbers in enumerate(used):
                keys[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
                for n, column in enumerate(numbers):
                    weights[row, n] = torch.tensor([w.get(column, 0.0) for w in shares[row]])
            self._layout = keys, weights, known
        return self._layout

    def _weights(
        self, prompts: Prompts, element: int, groups: Sequence[tuple[int, int]]
    ) -> dict[int, float]:
        """Column -> its share of a span; none where the text encoder cuts the span off."""
        try:
            pieces = [prompts.columns(element, a, b) for a, b in groups]
        except InputError:
            return {}
        if self.recipe.average == "tokens":
            pieces = [[c for p in pieces for c in p]]
        weights: dict[int, float] = {}
        for piece in pieces:
            for column in piece:
                weights[column] = weights.get(column, 0) + 1 / len(piece) / len(pieces)
        return weights

    def maps(self) -> Tensor:
        """`[images, spans, height, width]`, float32 on the CPU; spans that are cut off are NaN.

        Raises:
            RuntimeError: nothing was seen yet.
        """
        if not self._sums:
            raise RuntimeError("nothing was seen yet: run the pipeline inside the `with`")
        sizes = {tuple(t.shape[-2:]) for t, _ in self._sums.values()}
        height, width = max(sizes, key=lambda s: s[0] * s[1])
        wide = self.recipe.grid / max(height, width)
        size = (max(1, round(wide * height)), max(1, round(wide * width)))
        total, count = torch.zeros(()), 0
        for summed, steps in self._sums.values():
            if self.recipe.finest and tuple(summed.shape[-2:]) != (height, width):
                continue
            heads = summed.shape[1]
            fine = resized(summed.flatten(0, 2), size, self.recipe.resize).clamp_min(0)
            total = total + fine.unflatten(0, summed.shape[:3]).sum(1).cpu() / steps
            count += heads
        mean = total / count
        assert self._layout is not None
        mean[~self._layout[2]] = torch.nan
        return mean

    def report(self) -> dict[str, Any]:
        """Plain data: the token columns of each span, whether it was cut off, and what
        `described` says of its map in each image.
        """
        spans = []
        for maps, tokens, cut in zip(self.maps().unbind(1), self.tokens, self.cut):
            images = [] if cut else [described(one) for one in maps]
            spans.append({"tokens": tokens, "cut": cut, "images": images})
        return {"spans": spans}


def resized(maps: Tensor, size: tuple[int, int], how: str = "bicubic") -> Tensor:
    """`[maps, height, width]` at another size."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    more = {} if how == "area" else {"align_corners": False}
    return F.interpolate(maps[:, None], size, mode=how, **more)[:, 0]


def described(values: Tensor) -> dict[str, float]:
    """Least, greatest, sum, centroid and second moments (shares of width and height) of a map.

    >>> at = described(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    >>> at["x"], at["y"], at["xx"]
    (0.75, 0.75, 0.0)
    """
    m = values.double()
    height, width = m.shape
    x = (torch.arange(width, dtype=torch.double) + 0.5) / width
    y = (torch.arange(height, dtype=torch.double) + 0.5) / height
    total = float(m.sum())
    share = m / total if total > 0 else torch.full_like(m, 1 / m.numel())
    cx, cy = float(share.sum(0) @ x), float(share.sum(1) @ y)
    return {
        "least": float(m.min()),
        "greatest": float(m.max()),
        "sum": total,
        "x": cx,
        "y": cy,
        "xx": float(share.sum(0) @ (x - cx) ** 2),
        "yy": float(share.sum(1) @ (y - cy) ** 2),
        "xy": float((y - cy) @ share @ (x - cx)),
    }


def draw(
    pipe: Any, caption: str, chunks: Sequence[Chunk], numbers: Iterable[int], recipe: Recipe
) -> tuple[list[Any], Tensor, ChunkMaps]:
    """Images of a caption, each from its own seed, and the maps `[images, chunks, grid, grid]`."""
    spans = []
    for chunk in chunks:
        every = words(chunk.text)
        named = [w for w in every if w.content] or every
        spans.append([(chunk.start + w.start, chunk.start + w.end) for w in named])
    seen = ChunkMaps(spans, recipe)
    noise = [
        torch.Generator().manual_seed(seed_of(caption, number, recipe.seed)) for number in numbers
    ]
    call: dict[str, Any] = {}
    if recipe.steps is not None:
        call["num_inference_steps"] = recipe.steps
    if recipe.guidance is not None:
        call["guidance_scale"] = recipe.guidance
    with Session(pipe, [seen]), torch.no_grad():
        images = pipe([caption] * len(noise), generator=noise, **call).images
    maps = seen.maps() if spans else torch.zeros(len(noise), 0, 1, 1)
    return images, maps, seen
