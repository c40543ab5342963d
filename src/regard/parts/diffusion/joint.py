"""The four relations of joint attention: image and text as they look at each other and themselves.

Where text and image are one sequence (Stable Diffusion 3, Flux, Qwen-Image, CogVideoX, ...) the map
of attention has four corners. Each is read exactly, for the words and patches that are asked for
alone: `exp(score - lse)` of their own rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Site
from regard.reach.denoising import denoising, rows_of

from .words import Grid, WordMaps, _Layout


@dataclass(eq=False)
class JointMaps(WordMaps):
    """Word maps, and the other three relations of joint attention beside them.

    `maps[word]` is image to text: how much each patch looks at the word. `sees(word)` is text to
    image: where the word looks. `between` is text to text, `patch(place)` image to image. Means
    over heads, layers and steps, of the rows that the prompt drives, as in `WordMaps`; the row of
    a word of several pieces is the mean of their rows.

    Args:
        patches: patches of the image that are pointed at, (row, column), in a video (frame, row,
            column), in the grid of the image's tokens.

    >>> import regard
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, maps = tiny_pipeline("flux"), JointMaps(["red", "circle"], patches=[(2, 3)])
    >>> with regard.apply(pipe, maps):
    ...     _ = pipe("a red circle", num_inference_steps=1, height=32, width=32)
    >>> maps["circle"].shape, maps.sees("circle").shape, maps.patch((2, 3)).shape
    (torch.Size([1, 8, 8]), torch.Size([1, 8, 8]), torch.Size([1, 8, 8]))
    >>> maps.between.shape
    torch.Size([1, 2, 2])

    Raises:
        InputError: as `WordMaps`; a patch outside the image.
        ReachError: a model without joint attention.
    """

    patches: Sequence[tuple[int, ...]] = ()
    _rows: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)
    _grid: Grid = field(default=(), init=False, repr=False)

    def sites(self, sites: list[Site]) -> list[Site]:
        joint_sites = super().sites(sites)
        if any(s.kind != "joint" for s in joint_sites):
            raise ReachError(
                "this model's text and image attend to each other in no call: WordMaps shows how "
                "its image looks at the text, which is all there is"
            )
        return joint_sites

    def _clear(self) -> None:
        super()._clear()
        self._rows, self._count, self._grid = {}, 0, ()

    def _beside(self, call: Call, state: State, layout: _Layout) -> None:
        place = denoising(call)
        queries, image, text = place.text_queries, place.image_keys, place.text
        assert place.grid is not None and queries is not None
        assert image is not None and text is not None
        rows = place.conditional
        with torch.no_grad():
            share = self._mean(call, rows_of(call, state, layout.keys + queries.start, rows))
            # rows of a word are averaged, whatever `combine` says of its columns
            weights = layout.weights / layout.weights.sum(1, keepdim=True).clamp_min(1e-9)
            looks = weights.transpose(1, 2) @ share  # [rows, words, keys]
            at = (layout.keys + text.start)[:, None].expand(-1, looks.shape[1], -1)
            self._put("sees", looks[:, :, image].unflatten(2, place.grid))
            self._put("between", looks.gather(2, at) @ layout.weights)
            if self.patches:
                patch_queries = torch.tensor([self._number(p, place.grid) for p in self.patches])
                share = rows_of(
                    call, state, patch_queries.to(call.q.device) + place.image.start, rows
                )
                share = self._mean(call, share)
                self._put("patches", share[:, :, image].unflatten(2, place.grid))
        self._count, self._grid = self._count + 1, place.grid

    def _mean(self, call: Call, share: Tensor) -> Tensor:
        share = share.float() if self.heads is None else self._some(share.float(), call)
        return share.mean(1)

    def _put(self, name: str, values: Tensor) -> None:
        if name in self._rows and self._rows[name].shape == values.shape:
            self._rows[name] += values
        else:
            self._rows[name] = values.clone()

    def _number(self, patch: tuple[int, ...], grid: Grid) -> int:
        if len(patch) != len(grid) or not all(0 <= n < size for n, size in zip(patch, grid)):
            raise InputError(f"patch {patch} lies outside the image, a grid of {grid}")
        number = 0
        for n, size in zip(patch, grid):
            number = number * size + n
        return number

    def sees(self, word: str) -> Tensor:
        """Text to image: where a word looks, `[elements, height, width]`, frames before in a video.
        Each row of attention sums to 1 over image and text, so a map sums to the image's share.
        """
        return self._known(self._sum("sees"))[:, self._at(word)]

    @property
    def between(self) -> Tensor:
        """Text to text: how much each word looks at each, `[elements, words, words]`, in the order
        of `names`; NaN where the prompt of a row lacks one of them.
        """
        known = self._seen().known
        both = known[:, :, None] & known[:, None]
        values = self._sum("between")
        return torch.where(both.to(values.device), values, torch.nan)

    def patch(self, place: tuple[int, ...]) -> Tensor:
        """Image to image: where a patch looks, `[elements, height, width]`."""
        places = [tuple(p) for p in self.patches]
        if tuple(place) not in places:
            raise InputError(f"patch {place} was not pointed at: there are {places}")
        return self._sum("patches")[:, places.index(tuple(place))]

    def _sum(self, name: str) -> Tensor:
        self._seen()
        return self._rows[name] / self._count

    def _known(self, values: Tensor) -> Tensor:
        known = self._seen().known.to(values.device)
        return torch.where(known.view(*known.shape, *[1] * len(self._grid)), values, torch.nan)

    def _at(self, word: str) -> int:
        names = self._seen().names
        if word not in names:
            self.map(word)  # says why
        return names.index(word)
