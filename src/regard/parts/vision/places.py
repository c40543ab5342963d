"""Where the images are in a batch of sequences, and what each image token shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

from .layouts import SIZES, Given, Row, family
from .stack import image_ids
from .views import Grid, View


@dataclass(frozen=True)
class Images:
    """The images of a batch of sequences. An image is a stretch of image tokens; a picture that is
    cut into tiles may be many of them.

    Attributes:
        number: `[batch, tokens]`, which image of its row a token belongs to, counted from 0; -1 is
            text or padding.
        patch: `[batch, tokens]`, which patch of that image the token shows, row by row; -1 for text
            and for the separators between rows of patches (LLaVA-NeXT, Pixtral).
        live: `[batch, tokens]`, false for padding.
        grids: of every row and image its grid: (rows, columns) of an image, (frames, rows, columns)
            of a video, None where it is not known. Where an image holds several grids, as those of
            LLaVA-NeXT and InternVL do, that of the first.
        views: of every row all grids of its images, in order. None for models whose layout is not
            known.
    """

    number: Tensor
    patch: Tensor
    live: Tensor
    grids: list[list[Grid | None]]
    views: list[list[View]]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """First and last + 1 token of every image of one row, in order."""
        numbers = self.number[row]
        spans = []
        for n in range(int(numbers.max()) + 1 if numbers.numel() else 0):
            at = (numbers == n).nonzero()[:, 0]
            spans.append((int(at[0]), int(at[-1]) + 1))
        return spans

    def cells(self, row: int) -> Tensor:
        """The tokens of all cells of the views of one row, view by view; all that show a patch
        where the layout is not known.
        """
        number, patch = self.number[row], self.patch[row]
        if not self.views[row]:
            return (patch >= 0).nonzero()[:, 0]
        tokens = []
        for view in self.views[row]:
            inside = (number == view.image) & (patch >= view.first)
            at = (inside & (patch < view.first + view.cells)).nonzero()[:, 0]
            tokens.append(at[patch[at].argsort()])
        return torch.cat(tokens)

    @property
    def count(self) -> int:
        """How many images there are in all rows."""
        return sum(map(len, self.grids))


def locate(
    model: Any,
    inputs: Mapping[str, Any],
    processor: Any = None,
    sizes: Sequence[tuple[int, int]] = (),
) -> Images:
    """The images in the inputs of a forward pass: `input_ids` and, where the model takes them,
    `attention_mask`, `image_grid_thw`, `video_grid_thw` and `image_sizes`.

    Image tokens in a pass that brings no pixels are text: a model may write one while it answers.
    `processor` and the sizes of the pictures, (width, height) each, say where crops lie on them
    that the inputs do not tell of (LLaVA-1.5, Gemma 3, InternVL).

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model = tiny_vlm("llava")
    >>> images = locate(model, vlm_inputs("llava", model, images=[2, 0]))
    >>> images.spans(0), images.spans(1), images.grids[0]
    ([(3, 19), (19, 35)], [], [(4, 4), (4, 4)])

    Raises:
        InputError: no `input_ids`, or image tokens that are no whole number of images.
    """
    ids = inputs.get("input_ids")
    if not torch.is_tensor(ids):
        raise InputError(
            "the places of the images are read from input_ids: pass them, not inputs_embeds"
        )
    ids = ids.detach()
    number = torch.full_like(ids, -1, dtype=torch.long)
    patch = number.clone()
    mask = inputs.get("attention_mask")
    live = torch.ones_like(ids, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.dim() == 2:
        live = mask[:, -ids.shape[1] :].bool()
    kinds = {} if all(inputs.get(n) is None for n in _PIXELS) else image_ids(model.config)
    names = {n: kind for kind, n in kinds.items()}
    given, layout = Given(model, inputs, processor, sizes), family(model)
    grids: list[list[Grid | None]] = []
    views: list[list[View]] = []
    for n, (tokens, lives) in enumerate(zip(ids.tolist(), live.tolist())):
        row = Row(n, tokens, [names.get(t) if on else None for t, on in zip(tokens, lives)])
        grids.append([])
        views.append([])
        at = picture = 0
        while at < len(tokens):
            if row.kinds[at] is None:
                at += 1
                continue
            for image in layout(given, row, at):
                at = image.start + len(image.patches)
                number[n, image.start : at] = len(grids[-1])
                patch[n, image.start : at] = torch.tensor(image.patches, device=ids.device)
                new = [replace(v, image=len(grids[-1]), picture=picture) for v in image.views]
                grids[-1].append(image.grid)
                views[-1] += new
            picture += 1
    return Images(number, patch, live, grids, views)


_PIXELS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


class Encoded:
    """The grids that a vision encoder was called with: `generate` runs it ahead of the first pass
    and leaves them out of what it passes on.
    """

    def __init__(self, model: Any) -> None:
        self._grids: list[Tensor] = []
        encoder = model.get_encoder(modality="image")
        hook = encoder.register_forward_pre_hook(self._note, with_kwargs=True)
        self.remove = hook.remove

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if torch.is_tensor(given) and given.shape[1:] == (3,) and not given.is_floating_point():
                self._grids.append(given)

    def complete(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a pass with the grids that belong to its encoded images and videos."""
        kinds = [kind for kind in inputs.get("mm_encoder_outputs") or {} if kind in SIZES]
        given = {SIZES[kind]: grid for kind, grid in zip(kinds, self._grids)}
        self._grids = []
        return {**given, **{n: x for n, x in inputs.items() if n not in given or x is not None}}
