"""What the maps of a model's mixers look like: sinks and indicators, streaming over tiles.

Weights that are no distribution (sigmoid, the score itself) count by their size, divided by its
sum over the row: a proxy, not comparable with softmax weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, attend
from regard.core.kernels.tiled import Size, Tiles
from regard.errors import InputError

from .operations import FORMS, Distances

NEAR = 4  # distances of local focus
SIZE = Size(64, 64, 64, 2**24)  # a tile holds all heads of a layer


@dataclass(frozen=True)
class Map:
    """Queries and keys of a layer, and the function of their scores.

    `extra` says whether the first key is a learned one that stands before the sequence.
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scale: float
    form: str = "softmax"
    table: Tensor | None = None
    extra: bool = False


@dataclass(frozen=True)
class Look:
    """Facts of one layer, float32, means over what they sum.

    Attributes:
        alpha: mean weight of each token over the queries that see it, `[batch, heads, tokens]`.
        extra: that of the learned key, `[batch, heads]`; None without one.
        entropy: sum over queries, in nats, `[batch, heads]`.
        concentration: Frobenius norm, `[batch, heads]`.
        diversity: mean over visible pairs of the standard deviation over heads, `[batch]`.
        focus: mean weight of the token 0 to 3 back, `[batch, heads, 4]`.
        sink: mean weight, over all queries, of the first token, `[batch, heads]`.
        largest: largest score before the function, `[batch, heads]`.
        proxy: whether the weights had to be normalised.
    """

    alpha: Tensor
    extra: Tensor | None
    entropy: Tensor
    concentration: Tensor
    diversity: Tensor
    focus: Tensor
    sink: Tensor
    largest: Tensor
    proxy: bool


@torch.no_grad()
def look(given: Map) -> Look:
    """One pass over the tiles (two where rows have to be summed first); memory of one tile."""
    q, k = given.q.float(), given.k.float()
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    bias: Any = None
    if given.table is not None:
        bias = Distances(given.table.float(), queries, keys)
    softmax = given.form == "softmax"
    lse = totals = None
    if softmax:
        dense = None if bias is None else bias.dense()
        lse = attend(q, k, k, mask=given.mask, scale=given.scale, bias=dense).lse
    else:
        totals = q.new_zeros(batch, k.shape[1], heads // k.shape[1], queries)
        for b, h, rows, _, w, _ in _sized(given, q, k, bias):
            totals[b, h, :, rows] += w.sum(-1)
        totals = totals.clamp_min(1e-8)
    shape = (batch, k.shape[1], heads // k.shape[1])
    received = q.new_zeros(*shape, keys)
    sums = {name: q.new_zeros(shape) for name in ("entropy", "square")}
    focus, diversity = q.new_zeros(*shape, NEAR), q.new_zeros(batch)
    visible, largest = 0.0, q.new_full(shape, -torch.inf)
    counts = q.new_zeros(keys)
    for b, h, rows, cols, w, top in _sized(given, q, k, bias, lse):
        largest[b, h] = torch.maximum(largest[b, h], top)
        p = w if totals is None else w / totals[b, h, :, rows, None]
        received[b, h, :, cols] += p.sum(-2)
        sums["entropy"][b, h] -= torch.xlogy(p, p).sum((-1, -2))
        sums["square"][b, h] += p.square().sum((-1, -2))
        diversity[b] += p.flatten(1, 2).std(1, correction=0).sum((-1, -2))
        first = rows.start + keys - queries - cols.start
        for n in range(NEAR):
            focus[b, h, :, n] += torch.diagonal(p, first - n, -2, -1).sum(-1)
        if b.start == 0:
            seen = given.mask.cells(queries, keys, rows, cols, q.device)[0, 0]
            visible += float(seen.sum())
            counts[cols] += seen.sum(0)
    received = received.flatten(1, 2)
    alpha = received / counts.clamp_min(1)
    first = int(given.extra)
    near = (queries - torch.arange(NEAR, device=q.device)).clamp_min(1)
    return Look(
        alpha=alpha[..., first:],
        extra=alpha[..., 0] if given.extra else None,
        entropy=sums["entropy"].flatten(1, 2),
        concentration=sums["square"].flatten(1, 2).sqrt(),
        diversity=diversity / max(visible, 1.0),
        focus=focus.flatten(1, 2) / near,
        sink=received[..., first] / queries,
        largest=largest.flatten(1, 2),
        proxy=not softmax,
    )


def _sized(
    given: Map, q: Tensor, k: Tensor, bias: Any, lse: Tensor | None = None
) -> Iterator[tuple[slice, slice, slice, slice, Tensor, Tensor]]:
    """Tiles of weights, by their size, 0 where the mask hides the pair; and the largest score."""
    for tile in Tiles(q, k, given.mask, given.scale, bias=bias, lse=lse, size=SIZE):
        b, h, rows = tile.batch, tile.heads, tile.rows
        scores = tile.scores
        if lse is not None:
            w = scores.exp()
            level = lse.unflatten(1, (k.shape[1], -1))[b, h, :, rows, None]
            scores = scores + level.masked_fill(level == -torch.inf, 0.0)
        else:
            shown = scores if tile.allowed is None else scores * tile.allowed
            w = FORMS[given.form].weight(shown).abs()
        if tile.allowed is not None:
            w = w * tile.allowed
            scores = scores.masked_fill(tile.allowed == 0, -torch.inf)
        yield b, h, rows, tile.cols, w, scores.amax((-1, -2))


@contextmanager
def mapping(model: Any) -> Iterator[dict[int, Map]]:
    """Keeps the map of every mixing layer of the forward pass inside, by layer."""
    from .layers import Mixer

    maps: dict[int, Map] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        given = module.map(x, kwargs["step"])
        if given is not None:
            maps[module.layer_idx] = given  # the tokens come after what runs beside them

    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    if not mixers:
        raise InputError(f"{type(model).__name__} has no mixers of regard.parts.mixers")
    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in mixers]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def looks(model: Any, ids: Tensor) -> dict[int, Look]:
    """The facts of every mixing layer on these tokens `[batch, tokens]`, by layer."""
    with mapping(model) as maps:
        model(input_ids=ids, use_cache=False)
    return {n: look(given) for n, given in sorted(maps.items())}


def indicators(seen: dict[int, Look]) -> dict[str, float]:
    """Means over layers, heads and sequences; none where no layer mixes."""
    if not seen:
        return {}
    layers = list(seen.values())
    tokens = layers[0].alpha.shape[-1]
    given = {
        "entropy": [x.entropy.mean() / tokens for x in layers],
        "concentration": [x.concentration.mean() for x in layers],
        "diversity": [x.diversity.mean() for x in layers],
        "sink": [x.sink.mean() for x in layers],
        **{f"focus_{n}": [x.focus[..., n].mean() for x in layers] for n in range(NEAR)},
    }
    means = {name: float(torch.stack(values).mean()) for name, values in given.items()}
    return {**means, "max_logit": max(float(x.largest.max()) for x in layers)}


def sink_rates(seen: dict[int, Look], epsilon: float = 0.3) -> dict[str, Any]:
    """Sink_k of every position in percent, mean alpha of the first, and the same of the learned
    key (`star`), where there is one.
    """
    if not seen:
        return {"sink": [], "alpha_1": None, "star": None, "alpha_star": None, "proxy": False}
    alpha = torch.stack([x.alpha for x in seen.values()], 1)
    extras = [x.extra for x in seen.values() if x.extra is not None]
    star = torch.stack(extras, 1) if extras else None
    return {
        "sink": (100 * (alpha > epsilon).float().mean((0, 1, 2))).tolist(),
        "alpha_1": float(alpha[..., 0].mean()),
        "star": None if star is None else 100 * float((star > epsilon).float().mean()),
        "alpha_star": None if star is None else float(star.mean()),
        "proxy": any(x.proxy for x in seen.values()),
    }
