"""Attention sinks: which tokens receive more of a head's attention than a threshold.

Everything here works on mean received attention, `seen["mean_received"]` of a `regard.watch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

EPSILON = 0.3
TAIL = 16


def stacked(alpha: Any) -> Tensor:
    """Mean received attention as `[batch, layers, heads, keys]`.

    Takes such a tensor, one layer `[batch, heads, keys]`, or a mapping of layers to those (what a
    watch gives). InputError for other shapes, or when layers differ in heads.
    """
    if isinstance(alpha, Mapping):
        layers = [alpha[n] for n in alpha]
        if not layers or len({x.shape for x in layers}) > 1:
            raise InputError(
                "the layers differ in heads or tokens: measure them apart with layers=[...]"
            )
        return torch.stack(layers, 1).float()
    if not torch.is_tensor(alpha) or alpha.dim() not in (3, 4):
        raise InputError(
            "mean received attention is [batch, heads, keys] or [batch, layers, heads, keys]"
        )
    return (alpha[:, None] if alpha.dim() == 3 else alpha).float()


def sink_rate(alpha: Any, epsilon: float = EPSILON, position: int = 0) -> float:
    """Share of (layer, head) pairs whose mean attention on `position` exceeds `epsilon`, in [0, 1].

    The threshold is set on each sequence, and the mean is taken afterwards: averaging the maps
    first gives other numbers.

    >>> alpha = torch.tensor([[[0.5, 0.1]], [[0.2, 0.1]]])     # two sequences, one head, two keys
    >>> sink_rate(alpha)
    0.5
    """
    return float(per_sequence(alpha, epsilon, position).mean())


def per_sequence(alpha: Any, epsilon: float = EPSILON, position: int = 0) -> Tensor:
    """The sink rate of every sequence, `[batch]`; their mean is `sink_rate`."""
    alpha = checked(alpha, epsilon, position)
    return (alpha[..., position] > epsilon).float().mean((1, 2))


def sink_rates(alpha: Any, epsilon: float = EPSILON) -> Tensor:
    """The sink rate of every position: `[keys]`."""
    return (checked(alpha, epsilon) > epsilon).float().mean((0, 1, 2))


def sink_map(alpha: Any, position: int = 0) -> Tensor:
    """Mean over sequences of the attention that `position` receives: `[layers, heads]`."""
    return checked(alpha, EPSILON, position)[..., position].mean(0)


def hidden_sinks(
    alpha: Any, epsilon: float = EPSILON, after: int = 0, tail: int = TAIL
) -> list[dict[str, Any]]:
    """Later tokens that are the sink of some head, the most common first.

    One entry a token: sequence, position, heads (how many have it as a sink) and alpha (the
    largest of these). The last `tail` tokens are left out.
    """
    alpha = checked(alpha, epsilon)
    late = alpha[..., after + 1 : max(after + 1, alpha.shape[-1] - tail)]
    count = (late > epsilon).sum((1, 2))
    largest = late.amax((1, 2))
    sinks = [
        {
            "sequence": row,
            "position": place + after + 1,
            "heads": int(count[row, place]),
            "alpha": float(largest[row, place]),
        }
        for row, place in count.nonzero().tolist()
    ]
    return sorted(sinks, key=lambda f: (-f["heads"], f["sequence"], f["position"]))


def uniform_alpha(tokens: int) -> float:
    """Mean attention that the first of `tokens` tokens receives under uniform causal attention.

    >>> round(uniform_alpha(64), 4)
    0.0741
    """
    if tokens < 1:
        raise InputError(f"a sequence has at least 1 token, not {tokens}")
    return sum(1 / i for i in range(1, tokens + 1)) / tokens


def checked(alpha: Any, epsilon: float, position: int = 0) -> Tensor:
    alpha = stacked(alpha)
    if not 0 < epsilon < 1:
        raise InputError(f"epsilon is a share of attention between 0 and 1, not {epsilon}")
    if alpha.shape[-1] < 2:
        raise InputError("a sequence of one token attends only to itself: give at least two tokens")
    if not 0 <= position < alpha.shape[-1]:
        raise InputError(f"position {position} is out of range: there are {alpha.shape[-1]} tokens")
    return alpha
