"""How each family of models lays the patches of a picture out as tokens: one table, and a function
for every kind of layout.

A layout reads a picture off its first image token on, from what the processor gave the model:
token ids, `image_grid_thw`, `image_sizes`, `batch_num_images`, or the features that `generate` has
had encoded already.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from regard.errors import InputError

from . import crops
from .stack import has_class_token
from .views import WHOLE, Box, Grid, View

SIZES = {"image": "image_grid_thw", "video": "video_grid_thw"}


@dataclass
class Row:
    """A sequence: its token ids, and of every token whether it shows an image or a video."""

    number: int
    ids: list[int]
    kinds: list[str | None]

    def run(self, at: int) -> int:
        """How many tokens of one kind follow each other from here on."""
        stop = at
        while stop < len(self.kinds) and self.kinds[stop] == self.kinds[at]:
            stop += 1
        return stop - at

    def runs(self, at: int) -> list[tuple[int, int]]:
        """Start and length of all stretches of the kind of the token here, from here on."""
        kind, found = self.kinds[at], []
        while at < len(self.kinds):
            if self.kinds[at] == kind:
                found.append((at, self.run(at)))
                at += found[-1][1]
            else:
                at += 1
        return found

    def need(self, at: int, count: int) -> None:
        """Refuse a stretch that is shorter than its image."""
        if self.run(at) < count:
            raise InputError(
                f"row {self.number} holds {self.run(at)} image tokens in a stretch, but its image "
                f"takes {count}: image tokens and images do not match; let the processor of the "
                "model make the inputs"
            )


@dataclass
class Image:
    """A stretch of tokens: its start, the patch that each token shows, and its grids."""

    start: int
    patches: list[int]
    views: list[View] = field(default_factory=list)
    frames: int = 1

    @property
    def grid(self) -> Grid | None:
        if not self.views:
            return None
        size = (self.views[0].rows, self.views[0].columns)
        return size if self.frames == 1 else (self.frames, *size)


class Given:
    """What the processor handed over with a batch, used up picture by picture."""

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        processor: Any,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        self.model, self.config, self.vision = model, model.config, model.config.vision_config
        self.processor = processor
        encoded = inputs.get("mm_encoder_outputs") or {}
        groups = _listed(inputs.get("batch_num_images"))
        lists: dict[str, list[Any]] = {
            "image": _listed(inputs.get("image_grid_thw")),
            "video": _listed(inputs.get("video_grid_thw")),
            "resized": _listed(inputs.get("image_sizes")),
            "alone": [n == 1 for n in groups for _ in range(n)],
            "picture": list(sizes),
        }
        for kind in SIZES:
            done = encoded.get(kind)
            lists[f"{kind} features"] = [] if done is None else list(done.pooler_output)
        self._lists = {name: deque(x) for name, x in lists.items()}

    def next(self, name: str) -> Any:
        """The next of these values, None where it was not given."""
        return self._lists[name].popleft() if self._lists[name] else None

    def left(self, name: str) -> int:
        """How many of these values are left."""
        return len(self._lists[name])


Layout = Callable[[Given, Row, int], list[Image]]


def unknown(given: Given, row: Row, at: int) -> list[Image]:
    """A stretch of image tokens of whatever arrangement."""
    return [Image(at, list(range(row.run(at))))]


def squares(given: Given, row: Row, at: int) -> list[Image]:
    """LLaVA-1.5: one square of patches, of a crop of the picture or of all of it."""
    side = given.vision.image_size // given.vision.patch_size
    strategy = getattr(given.config, "vision_feature_select_strategy", "default")
    first = int(strategy == "full" and has_class_token(given.model))
    patches = [-1] * first + list(range(side * side))
    row.need(at, len(patches))
    box = crops.fitted(given.processor, given.next("picture"))
    return [Image(at, patches, [_view(0, side, side, "whole", box)])]


def anyres(given: Given, row: Row, at: int) -> list[Image]:
    """LLaVA-NeXT and LLaVA-OneVision: a square of the whole picture, then the picture again from
    its tiles, without their padding, each row ending in a newline.
    """
    side, config = given.vision.image_size // given.vision.patch_size, given.config
    whole = _view(0, side, side, "whole", WHOLE)
    if row.kinds[at] == "video":
        return _pooled(given, row, at, -(-side // 2))
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if strategy == "full" and has_class_token(given.model):
        raise InputError(
            'LLaVA-NeXT with vision_feature_select_strategy="full" is not known: use "default"'
        )
    given.next("picture")
    size, alone = given.next("resized"), given.next("alone")
    feature, count = given.next("image features"), side * side
    if alone is False or (feature is not None and len(feature) == count + 1):
        row.need(at, count + 1)
        return [Image(at, [*range(count), -1], [whole])]
    box: Box | None = None
    if size is not None:
        rows, columns, box = crops.unpadded(config, size, side)
    elif feature is not None:  # the newlines tell the rows
        newline = next(
            (p for n, p in given.model.named_parameters() if n.endswith("newline")), None
        )
        if newline is None:
            return unknown(given, row, at)
        ends = (feature == newline.to(feature)).all(-1).nonzero()[:, 0].tolist()
        rows, columns = len(ends), ends[0] - count
    else:
        return unknown(given, row, at)
    patches = list(range(count))
    for n in range(rows):
        patches += [*range(count + n * columns, count + (n + 1) * columns), -1]
    row.need(at, len(patches))
    return [Image(at, patches, [whole, _view(count, rows, columns, "fine", box)])]


def _pooled(given: Given, row: Row, at: int, side: int) -> list[Image]:
    """A video of LLaVA-OneVision: the pooled patches of every frame, and one newline."""
    feature = given.next("video features")
    run = row.run(at) if feature is None else len(feature)
    frames, rest = divmod(run - 1, side * side)
    if rest:
        return unknown(given, row, at)
    views = [_view(n * side * side, side, side, f"frame {n + 1}", WHOLE) for n in range(frames)]
    return [Image(at, [*range(run - 1), -1], views, frames)]


def lines(given: Given, row: Row, at: int) -> list[Image]:
    """Pixtral and Mistral 3: rows of patches with a token of text after each."""
    size, feature = given.next("resized"), given.next("image features")
    given.next("picture")
    columns = row.run(at)
    if size is not None:
        merge = getattr(given.config, "spatial_merge_size", 1)
        rows, columns = (int(n) // (given.vision.patch_size * merge) for n in size)
    elif feature is not None:
        rows = len(feature) // columns
    else:
        return unknown(given, row, at)
    patches: list[int] = []
    for n in range(rows):
        start = at + n * (columns + 1)
        if start >= len(row.kinds) or row.kinds[start] is None:
            row.need(at, rows * columns)  # says that they do not match
        row.need(start, columns)
        patches += [-1] * (n > 0) + list(range(n * columns, (n + 1) * columns))
    return [Image(at, patches, [_view(0, rows, columns, "whole", WHOLE)])]


def marked_tiles(given: Given, row: Row, at: int) -> list[Image]:
    """Idefics 3 and SmolVLM: tiles row by row, each after a token with its row and column, then
    the whole picture after a token for that; a frame of a video is the whole alone.

    The picture is stretched to a whole number of tiles, so they divide it evenly. Tiles of a row
    have two tokens between them, and a line break more where the next row begins.
    """
    count = (
        given.vision.image_size // given.vision.patch_size
    ) ** 2 // given.config.scale_factor**2
    side = math.isqrt(count)
    runs = row.runs(at)
    mark = row.ids[runs[-1][0] - 1]  # the last stretch of a prompt shows a whole picture
    stop = next(n for n, (start, _) in enumerate(runs) if row.ids[start - 1] == mark)
    *tiles, whole = [start for start, _ in runs[: stop + 1]]
    for start in (*tiles, whole):
        row.need(start, count)
    breaks = [b - a - count > 2 for a, b in pairwise(tiles)]
    columns = breaks.index(True) + 1 if True in breaks else len(tiles)
    images = []
    for n, start in enumerate(tiles):
        r, c = divmod(n, columns)
        box = crops.part(r, c, len(tiles) // columns, columns)
        view = _view(0, side, side, f"tile {r + 1}, {c + 1}", box)
        images.append(Image(start, list(range(count)), [view]))
    given.next("picture")
    return [*images, Image(whole, list(range(count)), [_view(0, side, side, "whole", WHOLE)])]


def scanned(given: Given, row: Row, at: int) -> list[Image]:
    """Gemma 3: the whole picture, then the crops of "pan and scan" where the processor makes them.

    Without the processor the crops count as pictures of their own.
    """
    count = int(given.config.mm_tokens_per_image)
    more = len(row.runs(at)) > given.left("picture")
    size = given.next("picture")
    boxes = crops.pan_and_scan(given.processor, size) if more else []
    names = ["whole", *(f"crop {n}" for n in range(1, len(boxes) + 1))]
    starts = [start for start, _ in row.runs(at)]
    side = math.isqrt(count)
    images = []
    for start, name, box in zip(starts, names, [WHOLE, *boxes]):
        row.need(start, count)
        images.append(Image(start, list(range(count)), [_view(0, side, side, name, box)]))
    return images


def packed_tiles(given: Given, row: Row, at: int) -> list[Image]:
    """InternVL: tiles row by row and then the whole picture, in one stretch; a frame of a video is
    the whole alone.
    """
    count = int(given.config.image_seq_length)
    side, run = math.isqrt(count), row.run(at)
    row.need(at, count)
    tiles = run // count
    boxes = crops.tiled(given.processor, given.next("picture"), tiles)
    views = [
        _view(n * count, side, side, f"tile {n + 1}" if box is None else name, box)
        for n, (name, box) in enumerate(boxes)
    ]
    return [Image(at, list(range(tiles * count)), views)]


def measured(given: Given, row: Row, at: int) -> list[Image]:
    """Qwen2-VL, 2.5 and 3: the whole picture, rows and columns as `image_grid_thw` says; a video
    frame by frame, where Qwen3-VL writes a time between frames.
    """
    kind = str(row.kinds[at])
    thw, feature = given.next(kind), given.next(f"{kind} features")
    if kind == "image":
        given.next("picture")
    if thw is None:
        run = row.run(at) if feature is None else len(feature)
        row.need(at, run)
        return [Image(at, list(range(run)))]
    merge = int(given.vision.spatial_merge_size)
    frames, rows, columns = int(thw[0]), int(thw[1]) // merge, int(thw[2]) // merge
    count = rows * columns
    names = ["whole"] if kind == "image" else [f"frame {n + 1}" for n in range(frames)]
    if kind == "video" and frames > 1 and row.run(at) == count:
        images = []
        for (start, _), name in zip(row.runs(at), names):
            row.need(start, count)
            view = _view(0, rows, columns, name, WHOLE)
            images.append(Image(start, list(range(count)), [view]))
        return images
    row.need(at, frames * count)
    views = [_view(n * count, rows, columns, name, WHOLE) for n, name in enumerate(names)]
    return [Image(at, list(range(frames * count)), views, frames)]


FAMILIES: dict[str, Layout] = {
    "llava": squares,
    "vipllava": squares,
    "llava_next": anyres,
    "llava_onevision": anyres,
    "pixtral": lines,
    "mistral3": lines,
    "idefics3": marked_tiles,
    "smolvlm": marked_tiles,
    "gemma3": scanned,
    "internvl": packed_tiles,
    "qwen2_vl": measured,
    "qwen2_5_vl": measured,
    "qwen3_vl": measured,
    "qwen3_vl_moe": measured,
}
"""`model_type` of the config -> layout. Pixtral's checkpoints say llava; their encoder does not."""


def family(model: Any) -> Layout:
    """The layout of a model; `unknown` where the table does not have it."""
    kind = getattr(model.config, "model_type", "")
    if kind == "llava" and getattr(model.config.vision_config, "model_type", "") == "pixtral":
        kind = "pixtral"
    return FAMILIES.get(kind, unknown)


def _view(first: int, rows: int, columns: int, name: str, box: Box | None) -> View:
    """A view whose image and picture are numbered by whoever reads the row."""
    return View(0, first, rows, columns, 0, name, box)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else torch.as_tensor(value).tolist()
