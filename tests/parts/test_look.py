"""Sinks and indicators of mixers equal those of the dense maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard
from regard.core import Mask
from regard.parts.mixers import MixerConfig, MixerForCausalLM, indicators, look, looks, sink_rates
from regard.parts.mixers.look import Map
from regard.parts.mixers.operations import FORMS


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "identity", "taylor"])
@pytest.mark.parametrize("tokens", [9, 130])
def test_indicators_of_the_card_on_the_dense_map(form: str, tokens: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
    seen = look(Map(q, k, Mask.causal(), 8**-0.5, form))
    s = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if form == "softmax":
        a = s.masked_fill(~causal, -torch.inf).softmax(-1)
    else:
        w = FORMS[form].weight(s).abs() * causal
        a = w / w.sum(-1, keepdim=True)

    def close(x: Tensor, y: Tensor) -> bool:
        return torch.allclose(x, y, atol=1e-5, rtol=1e-4)

    assert close(seen.entropy, -torch.xlogy(a, a).sum((-1, -2)))
    assert close(seen.concentration, a.flatten(2).norm(dim=-1))
    std = a.std(1, correction=0)
    assert close(seen.diversity, std.sum((-1, -2)) / (tokens * (tokens + 1) / 2))
    assert close(seen.sink, a[..., 0].mean(-1))
    assert close(seen.alpha, a.sum(-2) / torch.arange(tokens, 0, -1))
    near = [torch.diagonal(a, -n, -2, -1).mean(-1) for n in range(4)]
    assert close(seen.focus, torch.stack(near, -1))
    assert close(seen.largest, s.masked_fill(~causal, -torch.inf).amax((-1, -2)))
    assert seen.proxy == (form != "softmax")


def tiny(mixers: list[str]) -> MixerForCausalLM:
    torch.manual_seed(0)
    config = MixerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=len(mixers),
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, mixers=mixers,
    )  # fmt: skip
    return MixerForCausalLM(config).eval()


def test_softmax_layers_agree_with_watching() -> None:
    model = tiny(["standard", "non_approximate", "rnd_emb_qk", "static_emb_qk", "mlp"])
    ids = torch.randint(1, 64, (2, 20))
    with torch.no_grad(), regard.watch(model, facts=["mean_received", "entropy"]) as seen:
        model(ids)
    mine = looks(model, ids)
    assert list(mine) == [0, 1, 2, 3]
    for layer in (0, 2, 3):
        assert torch.allclose(mine[layer].alpha, seen["mean_received"][layer], atol=1e-5)
        assert torch.allclose(mine[layer].entropy, seen["entropy"][layer].sum(-1), atol=1e-4)
    assert set(indicators(mine)) >= {"entropy", "concentration", "diversity", "sink", "focus_3"}
    assert indicators({}) == {} and sink_rates({})["star"] is None


@pytest.mark.parametrize("mixer", ["k_bias", "kv_bias", "sink_token"])
def test_the_learned_key_takes_what_it_takes(mixer: str) -> None:
    """Its column beside the tokens': together the weights of a row are 1."""
    model = tiny([mixer])
    ids = torch.randint(1, 64, (2, 20))
    seen = looks(model, ids)[0]
    assert seen.extra is not None
    rows = seen.extra * 20 + (seen.alpha * torch.arange(20, 0, -1)).sum(-1)
    assert torch.allclose(rows, torch.full_like(rows, 20.0), atol=1e-4)
    rates = sink_rates({0: seen}, epsilon=0.01)
    assert rates["star"] == 100 * float((seen.extra > 0.01).float().mean())
