"""What `regard see` shows of a picture besides attention: which half of it a cut would keep."""

from __future__ import annotations

from typing import Any

import torch

from regard import watching
from regard.errors import RegardError
from regard.parts.vision import decoder, locate

from .method import VisionDrop
from .plan import height

JUDGES: dict[str, dict[str, Any]] = {
    "by the text": {"score": "text"},
    "by the picture": {},
    "by the picture, both ways": {"score_mask": "bidirectional"},
}


def rows(model: Any, inputs: Any) -> dict[str, float]:
    """Mean row, 0 top to 1 bottom, of the half of the patches that each judgement would keep, where
    the picture is one grid.
    """
    depth = len(decoder(model, "see").layers)
    heights = {}
    for name, settings in JUDGES.items():
        try:
            places = locate(model, inputs)
            shown = [v for v in places.views[0] if v.picture == 0]
            if len(shown) != 1 or shown[0].rows == 1:
                return {}
            first, last = places.spans(0)[0]
            half = {max(1, depth // 4): ((last - first) // 2, 0)}
            cut = VisionDrop(cuts=half, merge=False, **settings)
            with torch.no_grad(), watching.apply(model, cut):
                model(**inputs, use_cache=True)
            grid = (shown[0].rows, shown[0].columns)
            heights[name] = round(height(cut.kept()[0][0][-1], grid), 3)
        except RegardError:
            continue  # a cut that this model does not take has no row; all else needs none
    return heights
