"""Graph mixers against their definitions on the dense map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core import Mask, attend
from regard.errors import InputError
from regard.parts.mixers import MixerConfig, MixerForCausalLM, counts
from regard.parts.mixers.adjacency import ADJACENCIES, EDGES, POSITIVE, TOP, cuts, form_of, largest
from regard.parts.mixers.graph import HeadMLP
from regard.parts.mixers.operations import operate

VOCAB = 64


def tiny(mixer: str, layers: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "mixers": [mixer] * layers, "graph_threshold": 0.15,
    }  # fmt: skip
    return MixerForCausalLM(MixerConfig(**(settings | changes))).eval()


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.manual_seed(1))


def dense(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    s = q @ k.mT * q.shape[-1] ** -0.5
    return s.masked_fill(~allowed, -torch.inf).softmax(-1)


def edges(name: str, p: Tensor, allowed: Tensor, t: float) -> Tensor:
    """The adjacency of the card, from the dense map."""
    if name == "none":
        return p
    if name in EDGES:
        return EDGES[name](p, t) * allowed
    a = torch.zeros_like(p)
    for row in range(p.shape[-2]):
        seen = p[..., row, : row + (name == "top_k")]
        count = max(1, int(0.1 * (row + 1))) if name == "top_k" else -(-row // 10)
        if count:
            a[..., row, :].scatter_(-1, seen.topk(count, -1).indices, 1.0)
    return a


@pytest.mark.parametrize("name", [n for n in ADJACENCIES if n != "none"])
def test_sums_and_gradients_over_the_edges(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 25, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    allowed = torch.ones(25, 25, dtype=torch.bool).tril()
    a = edges(name, dense(q, k, allowed), allowed, 0.1)
    mask, scale = Mask.causal(), 8**-0.5
    if name in TOP:
        from regard.parts.mixers.adjacency import ABOVE

        cut, mask = cuts(q.detach(), k.detach(), mask, scale, name)
        sums, degree = operate(q, k, v, ABOVE, mask=mask, scale=scale, lse=cut)
    else:
        lse = attend(q, k, k[..., :1], mask=mask).lse
        sums, degree = operate(q, k, v, form_of(name, 0.1), mask=mask, lse=lse)
    assert torch.allclose(sums, a @ v, atol=1e-8)
    assert torch.allclose(degree, a.sum(-1), atol=1e-8)
    weight = torch.randn_like(sums)

    def grads(x: Tensor) -> Any:
        return torch.autograd.grad((x * weight).sum(), (q, k, v), allow_unused=True)

    for mine, theirs in zip(grads(sums), grads(a @ v)):
        assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-7)


def test_the_maximum_is_over_edges_and_its_gradient_goes_to_the_largest() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    edge = (dense(q, k, allowed) > 0.2) & allowed
    values = v[:, :, None].expand(-1, -1, 40, -1, -1)
    top = values.masked_fill(~edge[..., None], -torch.inf).amax(-2)
    truth = torch.where(edge.any(-1, keepdim=True), top, v)
    lse = attend(q, k, k[..., :1], mask=Mask.causal()).lse
    least = float(torch.tensor(0.2, dtype=torch.float64).log())
    out = largest(q, k, v, Mask.causal(), 8**-0.5, lse, least)
    assert not bool(edge.any(-1).all()) and torch.equal(out, truth)
    weight = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), v)[0] for x in (out, truth))
    assert torch.allclose(mine, theirs)


# -- layers on the dense map -----------------------------------------------------------------------
def parts(model: Any, ids: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A layer with its normed input, the map, what may be seen, and the hidden states split."""
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    step = model.model._step(model.model.embed_tokens(ids), None, None, None)
    q, k = layer.self_attn.queries_keys(x, step)
    allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    return layer.self_attn, x, dense(q, k, allowed), allowed, layer.self_attn.split(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eps", "one_plus_eps"])
@pytest.mark.parametrize("name", ADJACENCIES)
def test_gin_is_an_mlp_of_the_summed_neighbours(name: str, kind: str) -> None:
    """As torch-geometric's `GINConv` with edge weights, which has 1 + eps."""
    model = tiny("gin", layers=1, graph_adjacency=name, graph_self=kind)
    module, x, p, allowed, own = parts(model, tokens())
    module.eps.copy_(torch.tensor([0.3, -0.7]).view(2, 1, 1))
    a = edges(name, p, allowed, 0.15)
    for head in range(2):
        for row in range(12):  # a loop over edges, as message passing does it
            sums = sum(a[:, head, row, j, None] * own[:, head, j] for j in range(row + 1))
            eps = module.eps[head, 0, 0] + (kind == "one_plus_eps")
            u = eps * own[:, head, row] + sums
            m = module.heads_mlp
            hidden = u @ m.weight_in[head] + m.bias_in[head, 0]
            hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            hidden = torch.nn.functional.silu(hidden * m.norm[head, 0])
            truth = hidden @ m.weight_out[head] + m.bias_out[head, 0]
            step = model.model._step(x, None, None, None)
            out = module(x, step=step)[:, row].view(2, 2, 16)[:, head]
            assert torch.allclose(out, truth, atol=1e-5), (head, row)


@torch.no_grad()
@pytest.mark.parametrize("name", ADJACENCIES)
def test_pna_aggregates_values_in_four_ways(name: str) -> None:
    model = tiny("pna", layers=1, graph_adjacency=name)
    module, x, p, allowed, _ = parts(model, tokens())
    a = edges(name, p, allowed, 0.15)
    v = module.split(module.v_proj(x))
    degree = a.sum(-1, keepdim=True)
    degree = torch.where(degree == 0, 1.0, degree)
    mean = a @ v / degree
    var = (a @ v.square() / degree - mean.square()).clamp_min(0)
    edge = (a > 0) & allowed
    values = v[:, :, None].expand(-1, -1, 12, -1, -1)
    most = values.masked_fill(~edge[..., None], -torch.inf).amax(-2)
    most = torch.where(edge.any(-1, keepdim=True), most, v)
    truth = module.join(module.heads_mlp(torch.cat([a @ v, mean, most, var], -1)))
    step = model.model._step(x, None, None, None)
    assert torch.allclose(module(x, step=step), truth, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_differential_is_a_difference_of_maps(norm: bool) -> None:
    model = tiny("differential", layers=2, differential_norm=norm)
    module, x, p, _, _ = parts(model, tokens())
    v = module.split(module.v_proj(x))
    assert abs(float(module.weight) - 0.2) < 1e-6  # 0.8 - 0.6 at the first layer
    assert abs(float(model.model.layers[1].self_attn.weight) - 0.3555) < 1e-3
    mixed = (p[:, :2] - module.weight * p[:, 2:]) @ v
    if norm:
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 - 0.2)
    step = model.model._step(x, None, None, None)
    assert torch.allclose(module(x, step=step), module.join(mixed), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ADJACENCIES)
@pytest.mark.parametrize("mixer", ["gin", "pna"])
def test_every_adjacency_with_cache_and_padding(mixer: str, name: str) -> None:
    model = tiny(mixer, graph_adjacency=name)
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    alone = model(ids[:1, 3:]).logits[0]
    assert torch.allclose(whole[0, 3:], alone, atol=1e-3)
    first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    rest = model(ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, whole[:, 7:], atol=1e-3)
    assert whole[1].isfinite().all() and whole[0, 3:].isfinite().all()


def test_parameters_of_the_card() -> None:
    head = HeadMLP(1, 70, 35, 70, 0.1)
    assert sum(p.numel() for p in head.parameters()) + 1 == 5041  # and eps
    plain, gin = (counts(tiny(m, graph_size=2.0))["mixers"] for m in ("standard", "gin"))
    assert 0 < gin - plain < 0.1 * plain  # matched but for biases and norms


def test_a_positive_edge_is_one_above_the_threshold() -> None:
    p = torch.tensor([0.0, 0.1, 0.1999, 0.2001, 0.7])
    for name in EDGES:
        same = torch.equal(EDGES[name](p, 0.2) > 0, p > 0.2)
        assert same == (name in POSITIVE), name


def test_thresholds_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        tiny("pna", graph_threshold=0.0)
    with pytest.raises(InputError, match="unknown graph_adjacency"):
        tiny("gin", graph_adjacency="rleu")
    with pytest.raises(InputError, match="leaves no width"):
        tiny("gin", graph_size=0.01)
