"""Leakage of noun maps: the three losses of Dynamic Prompt Learning, and where background is.

Maps are `[nouns, height, width]`, the attention of image tokens on the columns of each noun. See
`regard.steer.dynamic_prompt_learning.method`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cosine_similarity, interpolate, pad

SHARPEN = 100.0


def noun_maps(words: Tensor, nouns: Sequence[Sequence[int]]) -> Tensor:
    """`[height, width, tokens]` -> `[nouns, height, width]`, the mean over each noun's columns."""
    return torch.stack([words[..., list(at)].mean(-1) for at in nouns])


def disjoint(maps: Tensor) -> Tensor:
    """Mean cosine of all pairs of maps; 0 for one noun alone.

    >>> float(disjoint(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])))
    0.0
    """
    pairs = list(combinations(maps.flatten(1), 2))
    if not pairs:
        return maps.sum() * 0
    return torch.stack([cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()


def leaked(maps: Tensor, background: Tensor) -> Tensor:
    """Mean cosine of the maps with the background `[height, width]`; 0 where there is none."""
    ground = background.to(maps).flatten()
    if not bool(ground.any()):
        return maps.sum() * 0
    return cosine_similarity(maps.flatten(1), ground[None], dim=1).mean()


def balance(whole: Tensor, columns: Sequence[Sequence[int]], smooth: bool = True) -> Tensor:
    """How far the weakest noun is from holding a place of its own.

    Args:
        whole: the map of every text column, `[height, width, tokens]`.
        columns: those of each noun.
        smooth: blur by the released 3 x 3 kernel before the maximum is taken.
    """
    # the first column and the very last leave; end of text and padding stay, as released
    shares = (SHARPEN * whole.float()[..., 1:-1]).softmax(-1)
    sharp = torch.stack([shares[..., [c - 1 for c in own]].sum(-1) for own in columns])
    if smooth:
        sharp = _blur(sharp)
    return (1 - sharp.flatten(1).amax(1)).clamp_min(0).amax()


def _blur(maps: Tensor) -> Tensor:
    """Weights exp(-d^2) of the 3 x 3 around each place: .332 in the middle, as released."""
    line = torch.tensor([math.exp(-1), 1.0, math.exp(-1)], device=maps.device, dtype=maps.dtype)
    kernel = line[:, None] * line
    kernel = kernel / kernel.sum()
    wide = pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return conv2d(wide, kernel[None, None])[:, 0]


def background(
    looks: Tensor,
    maps: Tensor,
    *,
    grid: tuple[int, int],
    clusters: int = 5,
    share: float = 0.2,
    seed: int = 0,
) -> Tensor:
    """Which places belong to no noun, boolean `[height, width]` of the maps.

    Places are clustered (k-means) by where they look in self-attention; a cluster is a noun's when
    that noun's map, scaled to a maximum of 1, is above `share` on average inside it.

    Args:
        looks: self-attention averaged over heads, layers and steps, `[tokens, tokens]`.
        maps: averaged noun maps, `[nouns, height, width]`.
        grid: of the tokens of `looks`.
        clusters, share, seed: of the clustering.

    >>> looks = torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    >>> background(looks, torch.tensor([[[1.0, 1.0], [0.1, 0.0]]]), grid=(2, 2), clusters=2)
    tensor([[False, False],
            [ True,  True]])

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError(
            "finding the background needs scikit-learn: pip install 'regard[steer]'"
        ) from None
    rows = looks.detach().double().cpu().numpy()
    labels = KMeans(min(clusters, len(rows)), n_init=10, random_state=seed).fit_predict(rows)
    large = interpolate(maps[None].float().cpu(), size=grid)[0]
    low = large.amin((1, 2), keepdim=True).abs()
    high = large.amax((1, 2), keepdim=True).clamp_min(torch.finfo(large.dtype).tiny)
    scaled = ((large - low) / high).flatten(1)
    label = torch.from_numpy(labels).long()
    ground = torch.ones(len(label))
    for cluster in label.unique():
        inside = label == cluster
        if float(scaled[:, inside].mean(1).max()) > share:
            ground[inside] = 0.0
    small = interpolate(ground.reshape(1, 1, *grid), size=maps.shape[-2:])[0, 0]
    return (small > 0.5).to(maps.device)
