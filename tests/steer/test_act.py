"""ACT: the fused edit is the explicit edit; neutral settings, decoding, batches, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.core import Mask, State, attend
from regard.core.kernels.reference import probabilities
from regard.errors import InputError
from regard.reach import Call, Site
from regard.steer.act import ACT, calibrate
from regard.zoo.tiny import tiny

IDS = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
LOW: dict[str, Any] = {
    "threshold": 0.08,
    "skip_layers": (0, 0),
}  # tiny random models have weak sinks


def explicit(p: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """The card's edit of the map `[batch, heads, queries, keys]`."""
    s = sinks[:, :, None]
    w = (p * s).sum(-1, keepdim=True)
    others = p * ~s
    rest = others.sum(-1, keepdim=True)
    edited = torch.where(s, beta * p, p + (1 - beta) * w * p / rest.clamp_min(1e-300))
    return torch.where(rest > 0, edited, p)


def a_call(k_factor: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Call, Tensor]:
    make = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 30, 8, generator=make, dtype=torch.float64) for _ in range(3))
    k[:, :, 5] = q.mean(2) * 4 * k_factor
    sinks = torch.zeros(2, 4, 30, dtype=torch.bool)
    sinks[:, :, 5] = True
    sinks[0, 1, [9, 11]] = True
    site = Site(0, "layer", 0, "layers", "self")
    parts = (t.to(dtype) for t in (q, k, v))
    return Call(site, *parts, Mask.causal(), 8**-0.5), sinks


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steep", [1.0, 5.0])
def test_fused_edit_is_the_explicit_edit(beta: float, steep: float) -> None:
    """Also where a column holds more than 0.999 of a row."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        call, sinks = a_call(steep, dtype)
        p = probabilities(call.q, call.k, call.mask, call.scale)
        if steep > 1:
            assert float((p * sinks[:, :, None]).sum(-1).max()) > 0.999
        found = calibrate(call, call.attend(), sinks, beta)
        true = explicit(p, sinks, beta) @ call.v.double()
        assert float((found.out.double() - true).abs().max()) < tolerance


def test_with_bias_window_and_padding() -> None:
    call, sinks = a_call()
    bias = torch.randn(
        1, 4, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    kept = torch.arange(30)[None] >= torch.tensor([[0], [6]])
    for mask in (Mask.causal() & Mask.window(9), Mask.causal() & Mask.padding(kept)):
        call = call.change(mask=mask, bias=bias)
        p = probabilities(call.q, call.k, mask, call.scale, bias=bias)
        found = calibrate(call, call.attend(), sinks, 0.3)
        true = explicit(p, sinks, 0.3) @ call.v
        assert torch.allclose(found.out, true, atol=1e-9)


def test_beta_one_is_the_plain_model() -> None:
    model = tiny("llama")
    with torch.no_grad():
        plain = model(IDS).logits
        with regard.apply(model, ACT(beta=1.0, **LOW)):
            assert torch.equal(model(IDS).logits, plain)
        with regard.apply(model, ACT(beta=0.2, **LOW)):
            assert not torch.allclose(model(IDS).logits, plain, atol=1e-3)
        assert torch.equal(model(IDS).logits, plain)


def test_the_sinks_are_those_of_the_map() -> None:
    model, method = tiny("llama"), ACT(**LOW)
    with torch.no_grad():
        with regard.watch(model, ["mean_received"]) as seen:
            model(IDS)
        with regard.apply(model, method):
            model(IDS)
    alpha = seen["mean_received"][0]
    want = alpha > 0.08
    want[..., 0] = False
    assert torch.equal(method.found()[0], want) and bool(want.any())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("mode", ["prefill", "dynamic"])
def test_decoding(family: str, mode: str) -> None:
    """Dynamic: sinks follow the text token by token; prefill: those of the prompt stay."""
    model = tiny(family)
    method = ACT(beta=0.3, mode=mode, **LOW)
    with torch.no_grad(), regard.apply(model, method):
        out = model(IDS[:, :12], use_cache=True)
        first = {n: s.clone() for n, s in method.found().items()}
        for t in range(12, 20):
            out = model(IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
    assert torch.isfinite(out.logits).all()
    for layer, sinks in method.found().items():
        assert sinks.shape[-1] == 20
        if mode == "prefill":
            assert torch.equal(sinks[..., :12], first[layer]) and not bool(sinks[..., 12:].any())
    if mode == "dynamic":
        with torch.no_grad(), regard.apply(model, whole := ACT(beta=0.3, **LOW)):
            model(IDS)
        # in the first layer nothing has been edited yet, so the final sets agree
        assert torch.equal(method.found()[0], whole.found()[0])


def test_left_padded_batch_equals_each_row_alone() -> None:
    model = tiny("llama")
    kept = torch.ones_like(IDS)
    kept[1, :6] = 0
    positions = (kept.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), regard.apply(model, ACT(beta=0.3, **LOW)):
        both = model(IDS, attention_mask=kept, position_ids=positions).logits
        alone = model(IDS[1:, 6:]).logits
    assert torch.allclose(both[1:, 6:], alone, atol=2e-5)


def test_head_lists(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"heads": {"1": [0, 3]}}))
    model = tiny("llama")
    outs = []
    for heads in ({1: [0, 3]}, file, str(file)):
        with (
            torch.no_grad(),
            regard.apply(model, method := ACT(beta=0.0, threshold=0.08, heads=heads)),
        ):
            outs.append(model(IDS).logits)
        assert list(method.found()) == [1] and method.found()[1].shape[1] == 2
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 1.5}, "beta"),
        ({"threshold": 0.0}, "threshold"),
        ({"alpha": 0}, "alpha"),
        ({"mode": "always"}, "mode"),
        ({"heads": "nowhere.json"}, "no head file"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ACT(**settings)


def test_a_list_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 9; this model has 2 layers"):
        regard.apply(tiny("llama"), ACT(heads={9: [0]}))
    with pytest.raises(InputError, match="head 8 of layer 1; this model has 4 heads"):
        model = tiny("llama")
        with torch.no_grad(), regard.apply(model, ACT(heads={1: [8]})):
            model(IDS)
    bad = tmp_path / "bad.json"
    bad.write_text("[1, 2]")
    with pytest.raises(InputError, match="no head list"):
        ACT(heads=bad)
    with pytest.raises(InputError, match="no method"):
        regard.apply(tiny("llama"), "act")  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_square() -> None:
    """8k tokens in one head stay under 200 MB: the map alone would take 256 MB."""
    q, k, v = (
        torch.randn(1, 1, 8192, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3)
    )
    site = Site(0, "layer", 0, "layers", "self")
    call = Call(site, q, k, v, Mask.causal(), 0.25)
    sinks = torch.zeros(1, 1, 8192, dtype=torch.bool)
    sinks[..., 100::400] = True
    state: State = attend(q, k, v, mask=Mask.causal())
    with torch.profiler.profile(profile_memory=True) as seen:
        calibrate(call, state, sinks, 0.4)
    live = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < 200e6
