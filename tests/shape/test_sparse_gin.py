"""Sparse-GIN against its definition, edge by edge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.core import Mask, attend
from regard.errors import InputError, ReachError
from regard.shape.graph_attention.adapter import Gin, Graph, SparseGIN, messages
from regard.zoo.tiny import tiny


def ids(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(0))


def edges(p: Tensor, graph: Graph) -> Tensor:
    """Weights `[batch, queries, keys]` from the map, as the card has them."""
    a = (p.sum(1) if graph.heads == "sum" else p.mean(1)).clamp_max(1)
    w = torch.sigmoid(graph.alpha * (a - graph.threshold))
    w = torch.where(w > graph.cut, w, 0.0).tril()
    return w * torch.eye(w.shape[-1]) if graph.compat else w


def test_the_parameters_of_the_card() -> None:
    with torch.device("meta"):
        layer = Gin(3072, 155, 0.1)
    assert sum(p.numel() for p in layer.parameters()) == 1_006_982
    assert 28 * 1_006_982 == 28_195_496


@pytest.mark.parametrize("graph", [Graph(), Graph(heads="mean"), Graph(compat="reference")])
def test_messages_and_their_gradients(graph: Graph) -> None:
    torch.manual_seed(0)
    q = (2 * torch.randn(2, 4, 70, 8, dtype=torch.float64)).requires_grad_()
    k = torch.randn(2, 2, 70, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 70, 5, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    s = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~causal, -torch.inf)
    truth = edges(s.softmax(-1), graph) @ x
    lse = attend(q, k, k[..., :1], mask=Mask.causal()).lse
    out = messages(q, k, lse, x, Mask.causal(), 8**-0.5, graph)
    assert torch.allclose(out, truth, atol=1e-9)
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, x)),
        torch.autograd.grad((truth * weight).sum(), (q, k, x)),
    ):
        assert torch.allclose(a, b, atol=1e-8)


def adapted(model: Any, **changes: Any) -> SparseGIN:
    torch.manual_seed(1)
    adapter = SparseGIN(model, hidden=8, **changes).eval()
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.endswith(("eps", "scale")):
                p.fill_(0.3)
    return adapter


@torch.no_grad()
@pytest.mark.parametrize("compat", ["", "reference"])
def test_a_model_with_the_adapter_is_the_explicit_one(compat: str) -> None:
    model = tiny("llama")
    adapter = adapted(model, graph=Graph(compat=compat))
    with regard.apply(model, adapter):
        out = model(ids()).logits
    model.set_attn_implementation("eager")
    body = model.model
    h = body.embed_tokens(ids())
    places = torch.arange(20)[None]
    rotary = body.rotary_emb(h, places)
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    heard = 0
    for layer, gin in zip(body.layers, adapter.gins):
        got, p = layer.self_attn(
            layer.input_layernorm(h), attention_mask=mask, position_embeddings=rotary
        )
        h = h + got
        w = edges(p, adapter.graph)
        heard += int((w > 0).sum())
        nodes = gin.enter(h)
        h = h + gin(nodes, w @ nodes)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    assert torch.allclose(out, model.lm_head(body.norm(h)), atol=1e-4)
    assert heard > 0


@torch.no_grad()
def test_off_cache_padding_and_no_trace() -> None:
    model = tiny("llama")
    plain = model(ids()).logits
    adapter = adapted(model)
    with regard.apply(model, adapter):
        whole = model(ids()).logits
        first = model(ids()[:, :13], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for a, b in ((13, 14), (14, 20)):
            parts.append(model(ids()[:, a:b], past_key_values=cache, use_cache=True).logits)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :6] = 0
        padded = model(ids(), attention_mask=mask).logits
        alone = model(ids()[:1, 6:]).logits
        other = ids()
        other[:, 12] = 7
        changed = model(other).logits
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert torch.allclose(padded[0, 6:], alone[0], atol=1e-4)
    assert torch.allclose(changed[:, :12], whole[:, :12], atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-3)
    assert torch.equal(model(ids()).logits, plain)
    off = SparseGIN(model, hidden=8, last=0.0).eval()
    with regard.apply(model, off):
        assert torch.allclose(model(ids()).logits, plain, atol=1e-6)


@torch.no_grad()
def test_the_reference_passes_no_messages_between_tokens() -> None:
    """In the first layer: with self loops alone a token's addition depends on itself alone."""
    torch.manual_seed(0)
    q, k = 2 * torch.randn(1, 4, 9, 8), torch.randn(1, 4, 9, 8)
    lse = attend(q, k, k, mask=Mask.causal()).lse
    x = torch.eye(9)[None]
    for compat, between in (("reference", False), ("", True)):
        w = messages(q, k, lse, x, Mask.causal(), 8**-0.5, Graph(compat=compat))[0]
        assert bool((w - torch.diag(torch.diagonal(w))).any()) == between


def test_only_the_adapter_learns_and_the_loss_falls() -> None:
    model = tiny("llama").requires_grad_(False)
    adapter = SparseGIN(model, hidden=8)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        with regard.apply(model, adapter):
            loss = model(ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        missing = [n for n, p in adapter.named_parameters() if p.grad is None]
        assert not missing
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert not [m for m in model.modules() if isinstance(m, nn.PReLU)]


@torch.no_grad()
def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = adapted(model, graph=Graph(compat="reference"))
    adapter.save(tmp_path / "adapter")
    names = sorted(f.name for f in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = SparseGIN.load(model, tmp_path / "adapter")
    outs = []
    for one in (adapter, loaded):
        with regard.apply(model, one):
            outs.append(model(ids()).logits)
    assert torch.equal(outs[0], outs[1]) and loaded.graph == adapter.graph
    with pytest.raises(InputError, match="no Sparse-GIN adapter"):
        SparseGIN.load(model, tmp_path)


def test_it_is_trained_beside_lora_of_as_many_parameters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from regard.shape.graph_attention import fine_tune

    model = tiny("llama").eval()
    before = copy.deepcopy(model.state_dict())
    data = (ids(8, 24), ids(4, 24))
    found = {}
    for kind in fine_tune.KINDS:
        found[kind] = fine_tune.train(
            kind, model, data, hidden=8, steps=3, batch=4, rate=0.01, seed=0, out=tmp_path / kind
        )
    counted = [run["parameters"] for run in found.values()]
    print(counted)
    assert max(counted) <= 1.25 * min(counted)
    assert all(run["loss"] < run["before"] for run in found.values())
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert (tmp_path / "sparse-gin" / "adapter_model.safetensors").is_file()
    with pytest.raises(InputError, match="Did you mean 'sparse-gin'"):
        fine_tune.adapters("sparse-gn", model, 8, 0)


def test_what_cannot_work_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="neighbours"):
        Graph(cut=0.2)
    with pytest.raises(InputError, match="below 1"):
        Graph(cut=1.0)
    with pytest.raises(InputError, match="at least 1"):
        SparseGIN(model, hidden=0)
    with pytest.raises(ReachError, match="Llama layout"):
        SparseGIN(tiny("gpt2"))
    with pytest.raises(ReachError, match="Llama layout"):
        SparseGIN(tiny("gemma2"))
