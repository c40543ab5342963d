"""A judge of drawn and generated scenes: what an image shows, by colour and by outline.

Pixels are named by the nearest colour, connected regions of one colour are things, and the shape is
the outline that covers the region best. No training; how often it is right on drawn scenes is
measured by `own_accuracy` and belongs beside every figure that rests on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import InputError
from regard.zoo.scenes import (
    BACKGROUNDS,
    COLORS,
    SHADE,
    SHAPES,
    SIZES,
    Scene,
    outline,
    relation_of,
    scene,
)

LEAST = 0.006  # share of the image that a thing covers at least
FINE = 64  # smaller images are enlarged to about so many pixels a side
FAR = 90.0  # RGB distance from which on a pixel has no name
UNLIKE = 60.0  # difference in one channel from which on a pixel is not the ground
_GRID = 24  # cells of an outline's side when regions are compared


@dataclass(frozen=True)
class Found:
    """One thing that the judge sees; `x`, `y` and `radius` are shares of the image's side.

    `fit` is the overlap (intersection over union) of the region with its best outline.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    fit: float
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what a scene says; each is true or false.

    Attributes:
        present: as many things as the scene has.
        colors: the same colours, each as often.
        shapes: the same shapes, each as often.
        binding: the same pairs of colour and shape.
        place: binding holds and the things stand as the caption says (true where it says nothing).
        size: binding holds and so do the sizes, where the caption names them.
        background: the background's colour, where the caption names it.
    """

    present: bool
    colors: bool
    shapes: bool
    binding: bool
    place: bool
    size: bool
    background: bool


def read(image: Any) -> tuple[str | None, list[Found]]:
    """Background and things of an image: `[height, width, 3]`, bytes or floats in 0..1, or PIL.

    Things come from the largest to the smallest; masks have the image's own size. The
    background is None when no named colour lies along the border.
    """
    pixels = _pixels(image)
    names, owner = _palette()
    distance = np.linalg.norm(pixels[:, :, None] - owner, axis=-1)
    named = distance.argmin(-1)
    named[distance.min(-1) > FAR] = -1
    label = np.where(named < 0, -1, _family()[named])
    border = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]])
    counts = [(border == n).sum() for n in range(len(names))]
    grounds = {n: counts[n] for n, name in enumerate(names) if name in BACKGROUNDS}
    ground = max(grounds, key=lambda n: grounds[n])
    background = names[ground] if counts[ground] > 0.3 * len(border) else None
    things = []
    for n, name in enumerate(names):
        if name not in COLORS:
            continue
        for region in _regions(label == n):
            thing = _thing(region, name)
            if thing is not None:
                things.append(replace(thing, mask=_back(thing.mask, image)))
    return background, sorted(things, key=lambda f: -float(f.mask.sum()))


def _back(mask: NDArray[np.bool_], image: Any) -> NDArray[np.bool_]:
    """A mask at the size of the image that was given: a pixel is in when more than half is."""
    width, height = image.size if hasattr(image, "convert") else image.shape[1::-1]
    times = mask.shape[0] // height
    shares = mask.reshape(height, times, width, times).mean((1, 3))
    return np.asarray(shares > 0.5)


def judge(image: Any, target: Scene) -> Verdict:
    """What an image got right of a scene.

    >>> drawn = scene(0)
    >>> judge(drawn.draw(64), drawn).present
    True
    """
    background, things = read(image)
    present = len(things) == len(target.things)
    pairs = sorted((t.color, t.shape) for t in target.things)
    binding = sorted((f.color, f.shape) for f in things) == pairs
    place = size = False
    if binding:
        matched = _match(things, target)
        place = target.relation is None or relation_of(*matched[:2]) == target.relation
        size = "size" not in target.named or all(
            f.size == t.size for f, t in zip(matched, target.things)
        )
    return Verdict(
        present,
        sorted(f.color for f in things) == sorted(t.color for t in target.things),
        sorted(f.shape for f in things) == sorted(t.shape for t in target.things),
        binding,
        place,
        size,
        "background" not in target.named or background == target.background,
    )


def foreground(image: Any) -> NDArray[np.bool_]:
    """Which pixels of a PIL image are unlike its border, `[height, width]`: things of any colour.

    >>> from PIL import Image
    >>> foreground(Image.fromarray(scene(0).draw(64))).shape
    (64, 64)
    """
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.asarray(np.abs(pixels - np.median(border, 0)).max(-1) > UNLIKE)


def own_accuracy(numbers: Sequence[int], side: int = 64, **settings: Any) -> dict[str, float | int]:
    """How often the judge is right on drawn scenes, for each thing it says.

    `mask` is the mean overlap of its regions with the exact masks, where binding is right.
    """
    if not numbers:
        raise InputError("name at least one scene to measure the judge on")
    verdicts, overlaps = [], []
    for number in numbers:
        drawn = scene(number, **settings)
        image = drawn.draw(side)
        verdicts.append(judge(image, drawn))
        if verdicts[-1].binding:
            matched = _match(read(image)[1], drawn)
            for thing, mask in zip(matched, drawn.masks(side)):
                overlaps.append(overlap(thing.mask, mask))
    result: dict[str, float | int] = {
        name: float(np.mean([getattr(v, name) for v in verdicts]))
        for name in Verdict.__dataclass_fields__
    }
    result["mask"] = float(np.mean(overlaps)) if overlaps else 0.0
    result["scenes"] = len(numbers)
    return result


def _match(things: list[Found], target: Scene) -> list[Found]:
    """The found things in the order of the scene's; those alike by the nearest place."""
    best: tuple[float, list[Found]] | None = None
    for order in permutations(things):
        if any((f.color, f.shape) != (t.color, t.shape) for f, t in zip(order, target.things)):
            continue
        far = sum(np.hypot(f.x - t.x, f.y - t.y) for f, t in zip(order, target.things))
        if best is None or far < best[0]:
            best = float(far), list(order)
    assert best is not None
    return best[1]


def _pixels(image: Any) -> NDArray[np.float64]:
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.ndim != 3 or array.shape[-1] != 3 or min(array.shape[:2]) < 16:
        raise InputError(
            f"an image of shape {array.shape} cannot be judged: give [height, width, 3], at least "
            "16 pixels wide"
        )
    floats = array.astype(np.float64)
    floats = floats * 255 if array.dtype.kind == "f" else floats
    return _enlarged(floats, -(-FINE // min(floats.shape[:2])))


def _enlarged(pixels: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Linear interpolation between pixel centres: a soft edge then says where it runs."""
    for axis in (0, 1):
        count = pixels.shape[axis]
        at = ((np.arange(count * times) + 0.5) / times - 0.5).clip(0, count - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, count - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        share = (at - low).reshape(shape)
        pixels = pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share
    return pixels


@lru_cache(maxsize=1)
def _palette() -> tuple[list[str], NDArray[np.float64]]:
    """Names of families, and every colour that belongs to one: shades follow the plain ones."""
    names = [*COLORS, *BACKGROUNDS]
    plain = [*COLORS.values(), *BACKGROUNDS.values()]
    shades = [tuple(SHADE * c for c in color) for color in COLORS.values()]
    return names, np.asarray([*plain, *shades], dtype=np.float64)


@lru_cache(maxsize=1)
def _family() -> NDArray[np.int64]:
    """Which name each colour of the palette belongs to."""
    return np.asarray([*range(len(COLORS) + len(BACKGROUNDS)), *range(len(COLORS))])


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected regions that are more than a soft edge: some pixel has all its neighbours."""
    core = ~_spread(~mask)
    regions = []
    while core.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(int(core.argmax()), core.shape)] = True
        while True:
            grown = _spread(region) & mask
            if (grown == region).all():
                break
            region = grown
        core &= ~region
        if region.mean() >= LEAST:
            regions.append(region)
    return regions


def _spread(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask with its eight neighbours."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    out = wide.copy()
    out[:, 1:] |= wide[:, :-1]
    out[:, :-1] |= wide[:, 1:]
    return out


def _thing(region: NDArray[np.bool_], color: str) -> Found | None:
    rows, columns = np.nonzero(region)
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    cells = _sampled(region[top:bottom, left:right])
    fits = [overlap(cells, other) for other in _outlines()]
    best = int(np.argmax(fits))
    side = min(region.shape)
    shape = SHAPES[best]
    # outlines do not fill their radius alike; the wider side is the safer measure
    radius = max(bottom - top, right - left) / 2 / side / _reach(shape)
    middle = (SIZES["small"][1] + SIZES["large"][0]) / 2
    y, x = (top + bottom) / 2, (left + right) / 2
    return Found(
        shape,
        color,
        "small" if radius < middle else "large",
        x / region.shape[1],
        y / region.shape[0],
        radius,
        fits[best],
        region,
    )


def _sampled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A region on a grid of fixed size, whatever its own."""
    at = [((np.arange(_GRID) + 0.5) / _GRID * n).astype(int) for n in mask.shape]
    return np.asarray(mask[np.ix_(*at)])


@lru_cache(maxsize=1)
def _outlines() -> list[NDArray[np.bool_]]:
    """Every shape, cut to its own bounds."""
    outlines = []
    for shape in SHAPES:
        inside = _ideal(shape)
        rows, columns = np.nonzero(inside)
        inside = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        outlines.append(_sampled(inside))
    return outlines


@lru_cache(maxsize=len(SHAPES))
def _reach(shape: str) -> float:
    """Half of a shape's wider side, for radius 1."""
    rows, columns = np.nonzero(_ideal(shape))
    return float(max(np.ptp(rows), np.ptp(columns)) + 1) / 400


def _ideal(shape: str) -> NDArray[np.bool_]:
    at = (np.arange(440) + 0.5) / 200 - 1.1
    return outline(shape, *np.meshgrid(at, at))


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 0 where both are empty.

    >>> overlap(np.array([True, True, False]), np.array([False, True, True]))
    0.3333333333333333
    """
    return float((a & b).sum() / max(1, (a | b).sum()))
