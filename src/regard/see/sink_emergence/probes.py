"""Why a token is a sink: norms and cosines of keys, values, queries and hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler


@dataclass
class Probes:
    """Why a token is a sink: means over the sequences, `[layers, heads]` unless said otherwise.

    Attributes:
        key_ratio, value_ratio: norm of the token's key (value) over the median of the
            other tokens'.
        key_ratio_mean, value_ratio_mean: the same over their mean.
        cosine: cos(q_t, key of the token), mean over the later queries; cosine_others: the same
            with the other keys that a query may look at.
        norms: |q_t| |k| times the scale, mean over later queries, the part of the logit that is
            not the cosine; norms_others: with the other keys.
        massive, massive_median: `[layers]`, norm of the token's hidden state after the layer over
            the mean (median) of the other tokens'.
    """

    key_ratio: Tensor
    value_ratio: Tensor
    key_ratio_mean: Tensor
    value_ratio_mean: Tensor
    cosine: Tensor
    cosine_others: Tensor
    norms: Tensor
    norms_others: Tensor
    massive: Tensor
    massive_median: Tensor


@dataclass
class Probe(Handler):
    """Norms and cosines of keys, values and queries at one position, in O(tokens x head_dim)."""

    position: int
    facts: dict[int, dict[str, Tensor]]

    def after(self, call: Call, state: State) -> None:
        queries, keys = call.q.shape[2], call.k.shape[2]
        ahead_area = (call.mask & Mask.band(-1, None)).area(queries, keys)
        looks_ahead = any(ahead_area) if isinstance(ahead_area, list) else ahead_area > 0
        if call.site.kind != "self" or looks_ahead:
            raise InputError(
                f"the sink metric is about causal attention, and {call.site.name} looks ahead: "
                'regard.watch(model, facts=["mean_received"]) measures such a model'
            )
        if not 0 <= self.position < keys:
            raise InputError(f"position {self.position} is out of range: there are {keys} tokens")
        groups = call.q.shape[1] // call.k.shape[1]
        q, k = call.q.float(), call.k.float().repeat_interleave(groups, 1)
        v = call.v.float().norm(dim=-1).repeat_interleave(groups, 1)
        p, kn, qn = self.position, k.norm(dim=-1), q.norm(dim=-1)
        unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
        others = torch.arange(keys, device=k.device) != p
        later = slice(p + 1, None)
        # sums over the other keys at or before each query, by running sums instead of a matrix
        number = others.cumsum(0)[later].clamp_min(1)
        direction = (unit_k * others[:, None]).cumsum(2)[:, :, later] / number[:, None]
        size = (kn * others).cumsum(2)[:, :, later] / number
        ahead = qn[:, :, later] * call.scale
        facts = {
            "cosine": (unit_q[:, :, later] * unit_k[:, :, p, None]).sum(-1).mean(-1),
            "cosine_others": (unit_q[:, :, later] * direction).sum(-1).mean(-1),
            "norms": (ahead * kn[:, :, p, None]).mean(-1),
            "norms_others": (ahead * size).mean(-1),
        }
        for name, norm in (("key", kn), ("value", v)):
            facts[f"{name}_ratio_mean"], facts[f"{name}_ratio"] = _ratios(norm, p)
        self.facts[call.site.index] = facts


def _ratios(norm: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Norm at one position over the mean and over the median of the others, along the last axis."""
    rest = torch.cat([norm[..., :position], norm[..., position + 1 :]], -1)
    middle = rest.quantile(0.5, dim=-1)
    at = norm[..., position]
    return at / rest.mean(-1).clamp_min(1e-12), at / middle.clamp_min(1e-12)


def on_layer(
    model: Any, part: str, layer: int, position: int, facts: dict[int, dict[str, Tensor]]
) -> Any:
    """Watch the hidden states that leave a layer, before any final norm."""
    try:
        module = model.get_submodule(f"{part}.{layer}")
    except AttributeError:
        raise ReachError(
            f"{type(model).__name__} has no module {part}.{layer} to watch hidden states of: "
            'regard.watch(model, facts=["mean_received"]) and sink_rate need none'
        ) from None

    def note(module: Any, args: Any, output: Any) -> None:
        hidden = output if torch.is_tensor(output) else output[0]
        mean, median = _ratios(hidden.float().norm(dim=-1), position)
        facts[layer] = {"massive": mean, "massive_median": median}

    return module.register_forward_hook(note)
