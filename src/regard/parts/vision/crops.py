"""Where the tiles and crops that processors make lie on the user's picture.

Sizes of pictures are (width, height) here, and (height, width) in transformers.
"""

from __future__ import annotations

from typing import Any

from .views import WHOLE, Box


def part(row: int, column: int, rows: int, columns: int) -> Box:
    """One tile of a picture that tiles divide evenly.

    >>> part(0, 1, 2, 4)
    (0.25, 0.0, 0.5, 0.5)
    """
    return (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)


def fitted(processor: Any, size: tuple[int, int] | None) -> Box | None:
    """What is left of a picture that is padded to a square, scaled, and cropped in the middle, as
    the settings of the processor say.
    """
    processor = getattr(processor, "image_processor", None)
    scaled = getattr(processor, "size", None)
    if scaled is None:
        return None
    stretched = bool(scaled.get("height") and scaled.get("width"))
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    padded = bool(getattr(processor, "do_pad", False)) and hasattr(processor, "pad_to_square")
    if stretched and crop is None and not padded:
        return WHOLE
    if size is None or not getattr(processor, "do_resize", True):
        return None
    canvas = (max(size), max(size)) if padded else size
    if stretched:
        wide, high = scaled["width"], scaled["height"]
    elif scaled.get("shortest_edge") and not scaled.get("longest_edge"):
        short = scaled["shortest_edge"]
        wide, high = (short if n == min(canvas) else short * n // min(canvas) for n in canvas)
    else:
        return None
    spans = []
    for edge, inner, outer, cut in zip(
        (wide, high), size, canvas, (crop["width"], crop["height"]) if crop else (wide, high)
    ):
        first = (edge - cut) // 2  # below 0 where the crop is larger, and filled up
        offset = (outer - inner) // 2  # of the picture on its square
        spans.append([(n * outer / edge - offset) / inner for n in (first, first + cut)])
    (left, right), (top, bottom) = spans
    return (left, top, right, bottom)


def unpadded(config: Any, size: list[int], side: int) -> tuple[int, int, Box]:
    """Rows and columns of patches that a picture of `size` (height, width) keeps of its tiles, and
    where they lie: the padding goes in whole patches, so up to one may show some of it.
    """
    from torch import empty
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    high, wide = size
    canvas = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    cell = config.vision_config.image_size / side
    tiles = [n // config.vision_config.image_size for n in canvas]
    rows, columns = (n * side for n in tiles)
    _, kept_rows, kept_columns = unpad_image(empty(1, rows, columns, device="meta"), size).shape
    scale = min(canvas[0] / high, canvas[1] / wide)
    spans = []
    for edge, given, all_cells, kept in zip(
        canvas, (high, wide), (rows, columns), (kept_rows, kept_columns)
    ):
        shown = min(-(-given * scale // 1), edge)
        before, first = (edge - shown) // 2, (all_cells - kept) // 2
        spans.append([(n * cell - before) / shown for n in (first, first + kept)])
    (top, bottom), (left, right) = spans
    most = getattr(config, "vision_aspect_ratio", None)  # LLaVA-OneVision scales large ones down
    if isinstance(most, str) and most.startswith("anyres_max_"):
        ratio = (
            kept_rows * kept_columns / (int(most.removeprefix("anyres_max_")) * side**2)
        ) ** 0.5
        if ratio > 1.1:
            kept_rows, kept_columns = int(kept_rows // ratio), int(kept_columns // ratio)
    return kept_rows, kept_columns, (left, top, right, bottom)


def pan_and_scan(processor: Any, size: tuple[int, int] | None) -> list[Box]:
    """The crops that Gemma 3's processor adds to a picture, as its own code cuts them."""
    pictures = getattr(processor, "image_processor", None)
    if size is None or pictures is None:
        return []
    from torch import arange
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    wide, high = size
    settings = {}
    for name in ("min_crop_size", "max_num_crops", "min_ratio_to_activate"):
        name = f"pan_and_scan_{name}"
        default = getattr(processor, "images_kwargs", {}).get(name)
        settings[name] = getattr(pictures, name) if default is None else default
    columns = arange(wide).expand(1, high, wide)
    rows = arange(high)[:, None].expand(1, high, wide)
    across, down = (
        Gemma3ImageProcessorPil.pan_and_scan(pictures, image=x, **settings)  # type: ignore[arg-type]
        for x in (columns, rows)
    )
    return [
        (
            int(x[0, 0, 0]) / wide,
            int(y[0, 0, 0]) / high,
            (int(x[0, 0, -1]) + 1) / wide,
            (int(y[0, -1, 0]) + 1) / high,
        )
        for x, y in zip(across, down)
    ]


def tiled(processor: Any, size: tuple[int, int] | None, count: int) -> list[tuple[str, Box | None]]:
    """Names and places of the `count` tiles of a picture of InternVL, the whole being the last."""
    if count == 1:
        return [("whole", WHOLE)]
    processor = getattr(processor, "image_processor", None)
    boxes: list[tuple[str, Box | None]] = [("tile", None)] * (count - 1)
    if size is not None and hasattr(processor, "max_patches"):
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            get_optimal_tiled_canvas,
        )

        tile = (processor.size["height"], processor.size["width"])
        columns, rows = get_optimal_tiled_canvas(
            (size[1], size[0]), tile, processor.min_patches, processor.max_patches
        )
        if rows * columns == count - 1:
            boxes = [
                (f"tile {r + 1}, {c + 1}", part(r, c, rows, columns))
                for r in range(rows)
                for c in range(columns)
            ]
    return [*boxes, ("whole", WHOLE)]
