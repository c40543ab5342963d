"""Task-KV: the whole key-value cache for the few heads that say something different on this prompt,
and a thin one for the others.

Paper: "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
He, Liu, Chen, 2025, arXiv 2501.15113. Once the prompt is read, each layer compares its key heads:
what a head reads, on average over the last queries, is its semantic vector. The heads farthest from
the mean of these vectors, and the nearest one, keep the whole prompt. The others keep sinks, recent
tokens and the middle tokens that the last queries look at most, so many that the budget is met.

Deviations, where what was published leaves it open (all ours):
- Averages over neighbours rank the tokens; the attention itself weighs them in the semantic vector.
- The query heads of a key head count as one, by the mean of their attention.
- The distance is Euclidean; cosine on request.
- One near head is promoted, and counted among the full heads.
- The number of full heads is rounded to the nearest; among equal distances the lower head goes
  first.
- A prompt too short for all sinks and recent tokens gets fewer recent ones, then fewer sinks. A
  budget too small for the full heads of a layer gives fewer of them, with a warning.
- Later tokens, a second turn included, are kept by every head and never compressed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError
from regard.parts.decoding.kept import Evicting, Group, ends_and_best, grouped, observed, pooled
from regard.reach import Call, Site

from .card import Settings


@dataclass(frozen=True)
class Plan:
    """What the heads of one layer keep: `full` of them all tokens, the others the first `sinks`,
    the best `middle` and the last `recent` ones.
    """

    full: int
    sinks: int
    middle: int
    recent: int
    lowered: bool = False  # fewer full heads than asked for

    @property
    def thin(self) -> int:
        """Rows of a head that is not full."""
        return self.sinks + self.middle + self.recent


@dataclass(frozen=True)
class Split:
    """How one layer was split: `full` are the key heads that kept the whole prompt, `[batch, f]`
    in ascending order, `distances` `[batch, kv_heads]` those of all heads from the centre.
    """

    full: Tensor
    distances: Tensor
    plan: Plan


class TaskKV(Settings, Evicting):
    """Keep `ratio` of the prompt's keys and values, all of them for the heads that differ.

    The prompt is what the first forward pass over an empty cache reads: chunks that follow are not
    compressed. Its own outputs are those of the plain model. `report()`, `nbytes` and
    `full_nbytes` tell of the last run.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> method = TaskKV(ratio=0.8, sinks=2, recent=4)
    >>> with torch.no_grad(), regard.apply(model, method):
    ...     ids = model.generate(torch.arange(3, 103)[None], max_new_tokens=1)
    >>> method.nbytes / method.full_nbytes, method.heads()[0].plan
    (0.8, Plan(full=1, sinks=2, middle=54, recent=4, lowered=False))

    Raises:
        InputError: a setting out of range; a model with one key head a layer, without a cache, or
            with another than causal attention; a padded prompt; a budget that does not even hold
            sinks and recent tokens.
    """

    name = "Task-KV"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._splits: dict[int, Split] = {}
        self._warned = False

    @property
    def neutral(self) -> bool:
        return self.ratio == 1

    def sites(self, sites: list[Site]) -> list[Site]:
        self._splits, self._warned = {}, False
        return super().sites(sites)

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        kv_heads = getattr(model.config.get_text_config(), "num_key_value_heads", None)
        if not self.neutral and kv_heads is not None:
            _check_heads(kv_heads)
        return super().attach(model)

    def heads(self) -> dict[int, Split]:
        """How each layer was split at the last prompt."""
        return dict(self._splits)

    def report(self) -> dict[str, Any]:
        """Plain data of the last prompt: by layer the full key heads, distances and kept rows."""
        layers = [
            {
                "layer": number,
                "full": split.full[0].tolist(),
                "distances": split.distances[0].tolist(),
                "sinks": split.plan.sinks,
                "middle": split.plan.middle,
                "recent": split.plan.recent,
            }
            for number, split in self._splits.items()
        ]
        return {"layers": layers}

    def fits(self, model: Any, tokens: int) -> None:
        """Refuse a prompt of so many tokens that some layer cannot keep within the budget."""
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            self.plan(heads, tokens, layer, config.num_hidden_layers)

    def plan(self, kv_heads: int, tokens: int, layer: int, layers: int) -> Plan:
        """What layer number `layer` of `layers` keeps of a prompt.

        >>> TaskKV(ratio=0.4, beta=0.25, m=4).plan(32, 2048, layer=0, layers=32)
        Plan(full=8, sinks=16, middle=137, recent=256, lowered=False)

        Raises:
            InputError: one key head, or a budget below sinks and recent tokens for every head.
        """
        _check_heads(kv_heads)
        if self.neutral:
            full = _asked(self.beta, self.m, kv_heads, layer, layers)
            return Plan(full, min(self.sinks, tokens), tokens - min(self.sinks, tokens), 0)
        budget = math.floor(self.ratio * kv_heads * tokens + 1e-9)
        full = _asked(self.beta, self.m, kv_heads, layer, layers)
        ends, lowered = self.sinks + self.recent, False
        if full >= kv_heads or budget - full * tokens < kv_heads - full:
            # not even one row is left for each of the others
            if budget < kv_heads * ends or tokens <= ends:
                raise InputError(
                    f"Task-KV: ratio={self.ratio:g} of {kv_heads} heads x {tokens} tokens is "
                    f"{budget} entries, too few for {full} whole heads, and for {ends} sinks and "
                    "recent tokens in each: raise ratio, or lower sinks and recent"
                )
            asked, full = full, (budget - kv_heads * ends) // (tokens - ends)
            lowered = full < asked
        thin = (budget - full * tokens) // (kv_heads - full)
        recent = min(self.recent, max(thin - self.sinks, 0))
        sinks = min(self.sinks, thin)
        return Plan(full, sinks, thin - sinks - recent, recent, lowered)

    def choose(self, call: Call, state: State) -> list[Group]:
        place = [s.index for s in self._own].index(call.site.index)
        kv_heads, tokens = call.k.shape[1:3]
        if self.neutral and kv_heads < 2:
            return [Group(call.k, call.v)]
        plan = self.plan(kv_heads, tokens, place, len(self._own))
        received = grouped(observed(call, state, self.window), kv_heads)
        smooth = pooled(received, self.pool)
        vectors = semantic(received, smooth, call.v, self.top)
        apart = distances(vectors, self.distance)
        full = split(apart, plan.full, self.nearest)
        self._splits[call.site.layer] = Split(full, apart, plan)
        if self.neutral:
            return [Group(call.k, call.v)]
        if plan.lowered:
            self._warn(call.site.layer, plan.full, tokens)
        thin = _others(full, kv_heads)
        scores = smooth.gather(1, thin[..., None].expand(-1, -1, tokens))
        kept = self.keep(scores, plan)
        groups = [Group(call.k, call.v, full)] if plan.full else []
        return [*groups, Group(call.k, call.v, thin if plan.full else None, kept)]

    def keep(self, scores: Tensor, plan: Plan) -> Tensor:
        """Positions that the thin heads keep, by the scores `[batch, thin heads, tokens]`."""
        return ends_and_best(scores, plan.sinks, plan.middle, plan.recent)

    def _warn(self, layer: int, full: int, tokens: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Task-KV: ratio={self.ratio:g} of {tokens} tokens holds only {full} whole heads "
                f"in layer {layer}, fewer than asked for: raise ratio, or lower beta and m",
                stacklevel=2,
            )


def semantic(received: Tensor, ranks: Tensor, v: Tensor, top: int | None) -> Tensor:
    """What each head reads: its values, weighted by mean attention, `[batch, heads, dim]` float32.

    Args:
        received: mean attention of every token, `[batch, heads, tokens]`.
        ranks: by which the `top` tokens are chosen; their weights are not made to add up to 1.
        v: values `[batch, heads, tokens, dim]`.

    >>> v = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1)
    >>> weights = torch.tensor([[[0.5, 0.1, 0.4]]])
    >>> [round(float(semantic(weights, weights, v, n)), 3) for n in (1, 2, None)]
    [0.5, 40.5, 41.5]
    """
    weights = received
    if top is not None and top < received.shape[-1]:
        kept = ranks.sort(dim=-1, descending=True, stable=True).indices[..., :top]
        weights = torch.zeros_like(received).scatter(-1, kept, received.gather(-1, kept))
    return (weights[:, :, None] @ v.to(weights.dtype))[:, :, 0]


def distances(vectors: Tensor, kind: str = "euclidean") -> Tensor:
    """Distance of each head's vector `[batch, heads, dim]` from their mean, `[batch, heads]`."""
    centre = vectors.mean(1, keepdim=True)
    if kind == "cosine":
        return 1 - torch.cosine_similarity(vectors, centre, dim=-1)
    return (vectors - centre).norm(dim=-1)


def split(apart: Tensor, full: int, nearest: int = 1) -> Tensor:
    """The `full` heads of each row that differ: the farthest, and of them `nearest` the nearest
    ones (at least one is far), ascending, `[batch, full]`.

    >>> split(torch.tensor([[0.3, 0.9, 0.1, 0.8]]), 3).tolist()
    [[1, 2, 3]]
    """
    near = max(0, min(nearest, full - 1))
    far = apart.sort(dim=-1, descending=True, stable=True).indices[:, : full - near]
    left = apart.scatter(-1, far, torch.inf)
    close = left.sort(dim=-1, stable=True).indices[:, :near]
    return torch.cat([far, close], -1).sort(-1).values


def _check_heads(kv_heads: int) -> None:
    if kv_heads < 2:
        raise InputError(
            f"Task-KV needs at least 2 key-value heads per layer, and this model has {kv_heads}"
        )


def _others(heads: Tensor, count: int) -> Tensor:
    """The heads of each row that are not named, ascending."""
    left = torch.ones(len(heads), count, dtype=torch.bool, device=heads.device)
    left = left.scatter(-1, heads, False)
    return left.nonzero()[:, 1].view(len(heads), -1)


def _asked(beta: float, m: int | None, kv_heads: int, layer: int, layers: int) -> int:
    """Full heads by the linear schedule, from beta of the heads to m of them."""
    first = kv_heads * beta
    last = kv_heads / 8 if m is None else m
    found = first - (first - last) * (layer / (layers - 1) if layers > 1 else 0)
    return min(max(math.floor(found + 0.5), 1), kv_heads)
