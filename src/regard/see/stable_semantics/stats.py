"""What a StableSemantics build holds, and the two benchmarks on it: captions and segmentation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import InputError

TAUS = tuple(n / 10 for n in range(1, 10))
SIDE = 16  # of average maps
Captioner = Callable[[Any], str]
Segmenter = Callable[[Any, Sequence[str]], Any]


def binarised(values: Tensor, tau: float = 0.4) -> Tensor:
    """Where a map reaches `tau` of its greatest value.

    >>> binarised(torch.tensor([0.1, 0.5, 1.0])).tolist()
    [False, True, True]
    """
    return values >= tau * values.max()


def statistics(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a build, where each root lies, and how alike its maps are over seeds.

    Returns:
        images, captions, chunks, maps, cut: counts; roots: for each, the most frequent first, its
        count, mean centroid (x, y), a 3 x 3 histogram of centroids (row by row) and its average map
        (each map divided by its sum); pairs: roots that stand in one caption, with counts;
        consistency: mean cosine of a chunk's maps over its images, and of maps of different roots
        in different images, to compare with.
    """
    seen: dict[str, list[tuple[float, float]]] = {}
    average: dict[str, Tensor] = {}
    shown: dict[tuple[str, int], list[Tensor]] = {}
    pairs: Counter[tuple[str, str]] = Counter()
    captions: set[str] = set()
    count = Counter(images=0, chunks=0, maps=0, cut=0)
    for row in rows:
        count["images"] += 1
        new = row["caption"] not in captions
        captions.add(row["caption"])
        roots = sorted({c["root"] for c in row["chunks"]})
        if new:
            pairs.update(combinations(roots, 2))
        for at, chunk in enumerate(row["chunks"]):
            count["chunks"] += 1
            count["cut"] += bool(chunk["cut"])
            if chunk["map"] is None:
                continue
            count["maps"] += 1
            values = torch.tensor(chunk["map"], dtype=torch.float32)
            small = F.adaptive_avg_pool2d(values[None], SIDE)[0]
            small = small / small.sum().clamp_min(1e-12)
            root = chunk["root"]
            seen.setdefault(root, []).append((chunk["x"], chunk["y"]))
            average[root] = average.get(root, torch.zeros(SIDE, SIDE)) + small
            shown.setdefault((row["caption"], at), []).append((small - small.mean()).flatten())
    same, other = _alike(list(shown.values()))
    roots_of = sorted(seen, key=lambda r: (-len(seen[r]), r))
    return {
        **count,
        "captions": len(captions),
        "roots": {r: _root(seen[r], average[r]) for r in roots_of},
        "pairs": [[a, b, n] for (a, b), n in pairs.most_common()],
        "consistency": {"same chunk": same, "other chunk": other},
    }


def _root(places: list[tuple[float, float]], total: Tensor) -> dict[str, Any]:
    cells = [[0] * 3 for _ in range(3)]
    for x, y in places:
        cells[min(2, int(3 * y))][min(2, int(3 * x))] += 1
    mean = total / len(places)
    return {
        "count": len(places),
        "x": sum(x for x, _ in places) / len(places),
        "y": sum(y for _, y in places) / len(places),
        "cells": cells,
        "map": [[float(f"{v:.4g}") for v in row] for row in mean.tolist()],
    }


def _alike(groups: list[list[Tensor]]) -> tuple[float | None, float | None]:
    """Mean cosine within groups, and between one group and the next."""
    unit = [F.normalize(torch.stack(g), dim=1) for g in groups]
    same = [float((u @ u.T).fill_diagonal_(0).sum() / (len(u) * (len(u) - 1)))
            for u in unit if len(u) > 1]  # fmt: skip
    other = [float((a @ b.T).mean()) for a, b in pairwise(unit)]
    return (_mean(same) if same else None), (_mean(other) if other else None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def score_segmenter(
    rows: Iterable[dict[str, Any]], segmenter: Segmenter, taus: Sequence[float] = TAUS
) -> dict[str, Any]:
    """Open-vocabulary segmentation: IoU of a segmenter's masks with the binarised maps.

    Args:
        segmenter: (image, texts of the chunks) -> one boolean mask a text, `[texts, height,
            width]`, at the image's or any size; see `from_pipeline`.

    Returns:
        iou: tau -> mean over chunks; best: the tau of the highest; chunks: how many.

    Raises:
        InputError: masks that do not match the texts, or no chunk with a map.
    """
    sums = dict.fromkeys(taus, 0.0)
    many = 0
    for row in rows:
        own = [c for c in row["chunks"] if c["map"] is not None]
        if not own:
            continue
        masks = torch.as_tensor(segmenter(row["image"], [c["text"] for c in own]))
        if masks.dim() != 3 or len(masks) != len(own):
            raise InputError(
                f"the segmenter gave {tuple(masks.shape)} for {len(own)} texts: give one mask a "
                "text, [texts, height, width]"
            )
        for chunk, mask in zip(own, masks):
            values = torch.tensor(chunk["map"], dtype=torch.float32)[None, None]
            values = F.interpolate(values, mask.shape, mode="bilinear", align_corners=False)[0, 0]
            for tau in taus:
                sums[tau] += iou(binarised(values, tau), mask.bool())
            many += 1
    if not many:
        raise InputError("there is no chunk with a map: build some first")
    mean = {tau: total / many for tau, total in sums.items()}
    return {"iou": mean, "best": max(mean, key=lambda t: mean[t]), "chunks": many}


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def from_pipeline(pipeline: Any, threshold: float = 0.5) -> Segmenter:
    """A transformers `image-segmentation` pipeline, or CLIPSeg-like model call, as a segmenter.

    Segments whose label is (part of) the text are joined; none of them gives an empty mask.
    """

    def segment(image: Any, texts: Sequence[str]) -> Tensor:
        import numpy as np

        parts = pipeline(image)
        masks = torch.zeros(len(texts), image.height, image.width, dtype=torch.bool)
        for part in parts:
            label = str(part["label"]).lower()
            mask = torch.from_numpy(np.asarray(part["mask"], dtype=np.float32))
            inside = mask > threshold * max(1.0, float(mask.max()))
            for n, text in enumerate(texts):
                if re.search(rf"\b{re.escape(label)}\b", text.lower()):
                    masks[n] |= inside
        return masks

    return segment


def score_captioner(
    rows: Iterable[dict[str, Any]],
    captioner: Captioner,
    embed: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """Captioning: how near a captioner's words come to the stored caption.

    Args:
        captioner: image -> text; of a transformers pipeline, take
            `lambda image: pipeline(image)[0]["generated_text"]`.
        embed: texts -> `[texts, dim]`, for the cosine of sentence embeddings.

    Returns:
        bleu: BLEU-4 of the whole set; roots: share of the captions' noun roots that are named;
        cosine: mean similarity, with `embed`.

    Raises:
        InputError: no rows.
    """
    said: list[str] = []
    wanted: list[str] = []
    named = total = 0
    for row in rows:
        text = captioner(row["image"])
        said.append(text)
        wanted.append(row["caption"])
        spoken = set(_tokens(text))
        for chunk in row["chunks"]:
            total += 1
            named += chunk["root"] in spoken
    if not said:
        raise InputError("there are no rows to score: build some first")
    out = {"bleu": bleu(said, wanted), "roots": named / total if total else 0.0}
    if embed is not None:
        a, b = (F.normalize(embed(t).float(), dim=1) for t in (said, wanted))
        out["cosine"] = float((a * b).sum(1).mean())
    return out


def bleu(said: Sequence[str], wanted: Sequence[str], most: int = 4) -> float:
    """BLEU of a set with one reference each: clipped n-gram precisions, brevity penalty, no
    smoothing.

    >>> bleu(["a red circle on a wall"], ["a red circle on a wall"])
    1.0
    >>> bleu(["a cat"], ["a dog"])
    0.0
    """
    logs = 0.0
    lengths = [sum(len(_tokens(t)) for t in texts) for texts in (said, wanted)]
    for n in range(1, most + 1):
        hit = total = 0
        for a, b in zip(said, wanted):
            own, reference = _grams(_tokens(a), n), _grams(_tokens(b), n)
            hit += sum(min(c, reference[g]) for g, c in own.items())
            total += sum(own.values())
        if not hit:
            return 0.0
        logs += math.log(hit / total) / most
    short = min(0.0, 1 - lengths[1] / lengths[0])
    return math.exp(logs + short)


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
