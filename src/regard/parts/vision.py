"""Where the images are in the sequences of a vision-language model, and the stack that reads them.

The models meant here project the patches of an image into the token sequence of their language
model: LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen3-VL and what has their layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, ReachError
from regard.reach import Site

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """The images of a batch of sequences.

    Attributes:
        number: `[batch, tokens]`, which image of its row a token belongs to, counted from 0; -1 is
            text or padding.
        patch: `[batch, tokens]`, which patch of that image the token shows, row by row; -1 for text
            and for the separators between rows of patches (LLaVA-NeXT).
        live: `[batch, tokens]`, false for padding.
        grids: of every row and image its grid: (rows, columns) of an image, (frames, rows, columns)
            of a video, None where it is not known. LLaVA-NeXT: the grid of the whole image, whose
            patches come first; those of the tiles follow.
    """

    number: Tensor
    patch: Tensor
    live: Tensor
    grids: list[list[Grid | None]]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """First and last + 1 token of every image of one row, in order."""
        numbers = self.number[row]
        spans = []
        for n in range(int(numbers.max()) + 1 if numbers.numel() else 0):
            at = (numbers == n).nonzero()[:, 0]
            spans.append((int(at[0]), int(at[-1]) + 1))
        return spans

    @property
    def count(self) -> int:
        """How many images there are in all rows."""
        return sum(map(len, self.grids))


def decoder(model: Any, method: str) -> Any:
    """The language model's stack, the module with `.layers`, of a model that reads images as
    tokens.

    Raises:
        InputError: a model without image tokens.
        ReachError: a model whose images are in an attention of their own, or without decoder
            layers.
    """
    config = getattr(model, "config", None)
    if not _ids(config) or not hasattr(model, "get_decoder"):
        raise InputError(
            f"{type(model).__name__} reads no images as tokens, and {method} works on image "
            "tokens: name a vision-language model such as LLaVA or Qwen-VL"
        )
    body = model.get_decoder()
    layers = getattr(body, "layers", None)
    if layers is None:
        raise ReachError(
            f"the language model of {type(model).__name__} has no list of layers that {method} "
            "can reach"
        )
    if any("cross" in name for name, _ in body.named_modules()):
        raise ReachError(
            f"{type(model).__name__} looks at images through cross-attention, and {method} works "
            "on image tokens in the sequence: name a model of LLaVA's or Qwen-VL's layout"
        )
    return body


def locate(model: Any, inputs: Mapping[str, Any]) -> Images:
    """The images in the inputs of a forward pass: `input_ids` and, where the model takes them,
    `attention_mask`, `image_grid_thw`, `video_grid_thw` and `image_sizes`.

    Image tokens in a pass that brings no pixels are text: a model may write one while it answers.

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
    ids, config = ids.detach(), model.config
    number = torch.full_like(ids, -1, dtype=torch.long)
    patch = number.clone()
    mask = inputs.get("attention_mask")
    live = torch.ones_like(ids, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.dim() == 2:
        live = mask[:, -ids.shape[1] :].bool()
    sizes = {name: iter(_list(inputs.get(key))) for name, key in _SIZES.items()}
    features = {name: iter(_encoded(inputs, name)) for name in ("image", "video")}
    grids: list[list[Grid | None]] = []
    kinds = _ids(config)
    of_ids = torch.stack([ids == n for n in kinds.values()]) & live
    if all(inputs.get(name) is None for name in _PIXELS):
        of_ids = of_ids & False
    for row in range(len(ids)):
        grids.append([])
        at = 0
        is_image = of_ids[:, row]
        places = is_image.any(0).tolist()
        while at < len(places):
            if not places[at]:
                at += 1
                continue
            kind = list(kinds)[int(is_image[:, at].int().argmax())]
            stop = at
            while stop < len(places) and is_image[list(kinds).index(kind), stop]:
                stop += 1
            grid, patches = _layout(model, kind, stop - at, sizes, next(features[kind], None))
            if len(patches) > stop - at:
                raise InputError(
                    f"row {row} holds {stop - at} image tokens in a stretch, but its image takes "
                    f"{len(patches)}: image tokens and images do not match; let the processor "
                    "of the model make the inputs"
                )
            stop = at + len(patches)
            number[row, at:stop] = len(grids[row])
            patch[row, at:stop] = patches.to(ids.device)
            grids[row].append(grid)
            at = stop
    return Images(number, patch, live, grids)


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
        kinds = [kind for kind in inputs.get("mm_encoder_outputs") or {} if kind in _SIZES]
        given = {_SIZES[kind]: grid for kind, grid in zip(kinds, self._grids)}
        self._grids = []
        return {**given, **{n: x for n, x in inputs.items() if n not in given or x is not None}}


_PIXELS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
_SIZES = {"image": "image_grid_thw", "video": "video_grid_thw", "tiles": "image_sizes"}


def _ids(config: Any) -> dict[str, int]:
    """The token ids that stand for patches, by what they show."""
    image = getattr(config, "image_token_id", None)
    image = getattr(config, "image_token_index", None) if image is None else image
    video = getattr(config, "video_token_id", None)
    ids = {"image": image, "video": video}
    if image is None or getattr(config, "vision_config", None) is None:
        return {}
    return {name: int(n) for name, n in ids.items() if n is not None}


def _list(value: Any) -> list[Any]:
    return [] if value is None else torch.as_tensor(value).tolist()


def _encoded(inputs: Mapping[str, Any], kind: str) -> list[Tensor]:
    """Features of every image where `generate` has run the encoder already (it then leaves the
    sizes out).
    """
    done = (inputs.get("mm_encoder_outputs") or {}).get(kind)
    return [] if done is None else list(done.pooler_output)


def _layout(
    model: Any, kind: str, run: int, sizes: dict[str, Any], feature: Tensor | None
) -> tuple[Grid | None, Tensor]:
    """The grid of the next image, and the patch that each of its tokens shows."""
    run = run if feature is None else len(feature)
    config, vision = model.config, model.config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge:
        thw = next(sizes[kind], None)
        if thw is None:
            return None, torch.arange(run)
        frames, rows, columns = int(thw[0]), int(thw[1]) // merge, int(thw[2]) // merge
        if kind == "video" and run == rows * columns:  # Qwen3-VL writes time stamps between frames
            if frames > 1:
                sizes[kind] = _again(sizes[kind], [frames - 1, *thw[1:]])
            frames = 1
        grid = (rows, columns) if frames == 1 else (frames, rows, columns)
        return grid, torch.arange(frames * rows * columns)
    side, size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(side, int) or not isinstance(size, int):
        return None, torch.arange(run)
    side //= size
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    first = 1 if strategy == "full" and has_class_token(model) else 0
    base = torch.cat([torch.full((first,), -1), torch.arange(side * side)])
    if not hasattr(config, "image_grid_pinpoints"):
        return (side, side), base
    image_size = next(sizes["tiles"], None)
    if feature is not None:
        newline = next((p for n, p in model.named_parameters() if n.endswith("newline")), None)
        if newline is None:
            return (side, side), torch.arange(run)
        ends = (feature == newline.to(feature)).all(-1).cpu()
        return (side, side), ((~ends).long().cumsum(0) - 1).masked_fill(ends, -1)
    if image_size is None:
        return None, torch.arange(run)
    return (side, side), torch.cat([base, _tiles(config, image_size, side, first)])


def _again(rest: Any, thw: list[int]) -> Any:
    yield thw
    yield from rest


def _tiles(config: Any, image_size: list[int], side: int, first: int) -> Tensor:
    """The patches of a LLaVA-NeXT image after those of its base: rows that end in a newline."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    tile = config.vision_config.image_size
    high, wide = get_anyres_image_grid_shape(list(image_size), config.image_grid_pinpoints, tile)
    if first:
        raise InputError(
            'LLaVA-NeXT with vision_feature_select_strategy="full" is not known: use "default"'
        )
    whole = torch.empty(1, high * side, wide * side, device="meta")
    _, rows, columns = unpad_image(whole, list(image_size)).shape
    numbers = side * side + torch.arange(rows * columns).view(rows, columns)
    return torch.cat([numbers, torch.full((rows, 1), -1)], 1).flatten()


def has_class_token(model: Any) -> bool:
    """Whether the vision tower puts a class token before the patches, as that of CLIP does."""
    return any(name.endswith("class_embedding") for name, _ in model.named_parameters())


def layer_sites(model: Any, body: Any, sites: Iterable[Site]) -> dict[int, Site]:
    """The site of attention in each layer of the language model, by the layer's number."""
    names = {id(m): n for n, m in model.named_modules()}
    by_layer: dict[int, Site] = {}
    for n, layer in enumerate(body.layers):
        prefix = names[id(layer)] + "."
        for site in sites:
            if site.name.startswith(prefix):
                by_layer.setdefault(n, site)
    return by_layer
