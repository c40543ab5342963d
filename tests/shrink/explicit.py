"""The dense truth that tests of the cache methods compare with: every map written out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import regard
from regard.core import State
from regard.parts.decoding.kept import Evicting
from regard.reach import Call, Handler
from regard.zoo.tiny import tiny


def wide(kv_heads: int = 6, heads: int = 12, layers: int = 3, steep: float = 40.0) -> Any:
    """A tiny Llama of many heads in float64, whose attention is far from uniform."""
    torch.manual_seed(3)
    config = copy.deepcopy(tiny("llama").config)
    config.num_key_value_heads, config.num_attention_heads = kv_heads, heads
    config.num_hidden_layers = layers
    model = type(tiny("llama"))(config).eval().double()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= steep
    return model


def ids(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randint(3, 120, (rows, count), generator=make)


def maps(call: Call, allowed: Tensor | None = None) -> Tensor:
    """The map `[batch, heads, queries, keys]` in float64."""
    k = call.k.double().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    scores = call.q.double() @ k.mT * call.scale
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    cells = call.mask.cells(call.q.shape[2], call.k.shape[2])
    scores = scores.masked_fill(~(cells if allowed is None else allowed), -torch.inf)
    if call.sinks is not None:
        learned = call.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, learned], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


class Dense(Handler):
    """Attention by its map, over the keys that are allowed in each layer; records the calls."""

    def __init__(self, allowed: dict[int, Tensor] | None = None) -> None:
        self.allowed = allowed or {}
        self.calls: dict[int, Call] = {}

    def after(self, call: Call, state: State) -> State:
        self.calls[call.site.layer] = call
        p = self.edit(call, maps(call, self.allowed.get(call.site.layer)))
        v = call.v.double().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        return State((p @ v).to(state.out.dtype), state.lse)

    def edit(self, call: Call, p: Tensor) -> Tensor:
        return p


def kept(method: Evicting, heads: int, prompt: int, total: int) -> dict[int, Tensor]:
    """Who sees whom in each layer, `[batch, heads, total, total]`: causal, and after the prompt
    only what each head kept of it.
    """
    found = {}
    for number, layer in method._found.items():
        batch = len(layer.groups[0].keys.data)
        keys = torch.zeros(batch, layer.kv_heads, total, dtype=torch.bool)
        keys[:, :, prompt:] = True
        for group in layer.groups:
            members = torch.arange(layer.kv_heads).expand(batch, -1)
            members = members if group.heads is None else group.heads
            at = torch.arange(prompt).expand(*members.shape, -1)
            at = at if group.positions is None else group.positions.long()
            for b in range(batch):
                for head, own in zip(members[b].tolist(), at[b]):
                    keys[b, head, own] = True
        rows = keys.repeat_interleave(heads // layer.kv_heads, 1)[:, :, None]
        rows = rows.repeat(1, 1, total, 1)
        rows[:, :, :prompt] = True
        found[number] = rows & torch.ones(total, total, dtype=torch.bool).tril()
    return found


def decode(model: Any, text: Tensor, prompt: int, *methods: Handler, step: int = 1) -> Tensor:
    """Logits of the tokens after the prompt, read `step` at a time."""
    with torch.no_grad(), regard.apply(model, *methods):
        cache = model(text[:, :prompt], use_cache=True).past_key_values
        found = [
            model(text[:, n : n + step], past_key_values=cache).logits
            for n in range(prompt, text.shape[1], step)
        ]
    return torch.cat(found, 1)


def dense(model: Any, text: Tensor, prompt: int, method: Evicting, like: Any = Dense) -> Tensor:
    """The same logits from one pass over the whole text, evicted keys hidden by a mask."""
    heads = model.config.num_attention_heads
    allowed = kept(method, heads, prompt, text.shape[1])
    with torch.no_grad(), regard.apply(model, like(allowed)):
        return model(text, use_cache=False).logits[:, prompt:]
