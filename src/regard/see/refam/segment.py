"""From a point to a mask: the heat around it, or a model that segments anything."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import InputError

from .card import Segmenter


def around(heat: Tensor, point: tuple[int, int], share: float = 0.5) -> Tensor:
    """The connected part of `heat >= share * max` that holds the point (column, row).

    >>> row = torch.tensor([[0.9, 0.1, 1.0, 0.8]])
    >>> around(row, (2, 0)).tolist()
    [[False, False, True, True]]
    """
    inside = heat >= share * heat.max()
    grown = torch.zeros_like(inside)
    grown[point[1], point[0]] = True
    while True:
        # a plus-shaped growth, held inside, until nothing changes
        f = grown.float()[None, None]
        wide = F.max_pool2d(f, (3, 1), 1, (1, 0)) + F.max_pool2d(f, (1, 3), 1, (0, 1))
        more = (wide[0, 0] > 0) & inside
        if torch.equal(more, grown):
            return more
        grown = more


CHECKPOINTS = {"sam": "facebook/sam-vit-huge", "sam2": "facebook/sam2-hiera-large"}


def sam(name: str, checkpoint: str | None = None) -> Segmenter:
    """SAM or SAM 2 of transformers as a segmenter: one positive point, the mask of best score.

    Raises:
        InputError: the checkpoint is not at hand.
    """
    import transformers

    kind = {"sam": "Sam", "sam2": "Sam2"}[name]
    source = checkpoint or CHECKPOINTS[name]
    try:
        model = getattr(transformers, f"{kind}Model").from_pretrained(source, use_safetensors=True)
        model = model.eval()
        processor = getattr(transformers, f"{kind}Processor").from_pretrained(source)
    except (OSError, ImportError) as problem:
        raise InputError(
            f"the segmenter {source} cannot be loaded ({str(problem).splitlines()[0]}): use "
            'segmenter="threshold", or a function of your own'
        ) from None

    def segment(image: Any, point: tuple[int, int]) -> Tensor:
        points = [[[[*point]]]] if name == "sam2" else [[[*point]]]
        labels = {"input_labels": [[[1]]]} if name == "sam2" else {}
        given = processor(image.convert("RGB"), input_points=points, return_tensors="pt", **labels)
        with torch.no_grad():
            out = model(**given)
        sizes = [given["original_sizes"]]
        if name == "sam":
            sizes.append(given["reshaped_input_sizes"])
        masks = processor.post_process_masks(out.pred_masks.cpu(), *sizes)[0]
        best = int(out.iou_scores.flatten().argmax())
        return masks.flatten(0, -3)[best].bool()

    return segment
