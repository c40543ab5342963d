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
from regard.steer.act.method import ACT, calibrate
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
        assert sinks.shape[-1] == (20 if mode == "dynamic" else 12)
        if mode == "prefill":
            assert torch.equal(sinks, first[layer])
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
            regard.apply(model, method := ACT(beta=0.0, heads=heads, **LOW)),
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
        ({"alpha": float("nan")}, "alpha"),
        ({"skip_layers": (-1, 0)}, "skip_layers"),
        ({"mode": "always"}, "mode"),
        ({"min_rows": 0}, "min_rows"),
        ({"heads": {3: [1, 1]}}, "layer 3 twice"),
        ({"heads": "nowhere.json"}, "no head file"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ACT(**settings)


def test_a_list_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 9; this model has 2 layers"):
        regard.apply(tiny("llama"), ACT(heads={9: [0]}))
    with pytest.raises(InputError, match="layer 1, but ACT leaves the first 2"):
        regard.apply(tiny("llama"), ACT(heads={1: [0]}))
    with pytest.raises(InputError, match="head 8 of layer 1; this model has 4 heads"):
        model = tiny("llama")
        with torch.no_grad(), regard.apply(model, ACT(heads={1: [8]}, skip_layers=(0, 0))):
            model(IDS)
    bad = tmp_path / "bad.json"
    for text in ("[1, 2]", "{nope", '{"1": 3}', '{"1": [1.5]}', '{"one": [1]}'):
        bad.write_text(text)
        with pytest.raises(InputError, match="no head list"):
            ACT(heads=bad)
    with pytest.warns(UserWarning, match="names no head"):
        regard.apply(tiny("llama"), ACT(heads={1: []}))
    with pytest.raises(InputError, match="last 9 of the 2 layers alone"):
        regard.apply(tiny("llama"), ACT(heads={0: [0]}, skip_layers=(0, 9)))
    with pytest.raises(InputError, match="no method"):
        regard.apply(tiny("llama"), "act")  # type: ignore[arg-type]


def keyed(
    queries: int, keys: int, seed: int, kv: int = 2, heads: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (kv, keys), (kv, keys))
    q, k, v = (torch.randn(2, *s, 8, generator=make, dtype=torch.float64) for s in shapes)
    k[:, :, 5] *= 3
    return q, k, v


def dense_sinks(p: Tensor, bar: float) -> Tensor:
    """Sinks of a dense map: column sums over the queries that may look."""
    count = (p > 0).sum(-2).clamp_min(1)
    sinks = p.sum(-2) / count > bar
    sinks[..., 0] = False
    return sinks


@pytest.mark.parametrize("mode", ["prefill", "dynamic"])
def test_heads_that_keep_other_keys(mode: str) -> None:
    """Calls for groups of heads over a subset of the keys: sinks go by position and head."""
    site = Site(0, "layer", 0, "layers", "self")
    method = ACT(beta=0.3, threshold=0.06, heads={0: [3, 0, 2]}, skip_layers=(0, 0), mode=mode)
    q, k, v = keyed(31, 31, 4)
    first = Call(site, q[:, :, :30], k[:, :, :30], v[:, :, :30], Mask.causal(), 0.35)
    found = method.after(first, first.attend())
    p = probabilities(first.q, first.k, first.mask, 0.35)
    sinks = dense_sinks(p, 0.06)
    sinks[:, 1] = False
    whole = explicit(p, sinks, 0.3) @ first.v.repeat_interleave(2, 1)
    assert found is not None and torch.allclose(found.out, whole, atol=1e-9)
    total, count = p.sum(-2), (p > 0).sum(-2).double()

    # heads 0, 1 read key head 0 with 12 keys, heads 2, 3 key head 1 with 9, padded to 12
    make = torch.Generator().manual_seed(5)
    kept = [torch.randperm(30, generator=make)[:n].sort().values for n in (11, 8)]
    kept = [torch.cat([x, torch.tensor([30])]) for x in kept]
    for heads, own in (([0, 1], 0), ([3, 2], 1)):
        at = torch.cat([torch.zeros(12 - len(kept[own]), dtype=torch.long), kept[own]])
        live = torch.arange(12) >= 12 - len(kept[own])
        call = Call(
            site,
            q[:, heads, 30:],
            k[:, [own]][:, :, at],
            v[:, [own]][:, :, at],
            Mask.padding(live[None].expand(2, -1)),
            0.35,
            query_offset=30,
            heads=torch.tensor(heads),
            positions=at.expand(2, 1, -1),
        )
        edited = method.after(call, plain := call.attend())
        p = probabilities(call.q, call.k, call.mask, 0.35)
        for row, head in enumerate(heads):
            marked = sinks[:, head, at[:-1]] if mode == "prefill" else None
            if marked is None:  # the running means of the keys that are still there
                sums = torch.zeros(2, 31, dtype=torch.float64)
                seen = torch.zeros(2, 31, dtype=torch.float64)
                sums[:, :30], seen[:, :30] = total[:, head], count[:, head]
                sums[:, at[live]] += p[:, row, 0][:, live]
                seen[:, at[live]] += 1
                now = sums / seen > 0.06
                now[:, 0] = False
                marked = now[:, at]
            else:
                marked = torch.cat([marked, torch.zeros(2, 1, dtype=torch.bool)], -1)
            want = plain.out[:, row, 0]
            if head != 1:
                p_row = p[:, row : row + 1]
                want = (explicit(p_row, marked[:, None], 0.3) @ call.v)[:, 0, 0]
                assert bool((marked & live).any())
            got = plain.out if edited is None else edited.out
            assert torch.allclose(got[:, row, 0], want, atol=1e-9), head


def test_masks_that_differ_by_head() -> None:
    call, sinks = a_call()
    allowed = torch.rand(2, 4, 30, 30, generator=torch.Generator().manual_seed(3)) > 0.4
    allowed &= torch.ones(30, 30, dtype=torch.bool).tril()
    allowed[..., 0] = True
    call = call.change(mask=Mask.dense(allowed))
    p = probabilities(call.q, call.k, call.mask, call.scale)
    true = explicit(p, sinks, 0.4) @ call.v
    assert torch.allclose(calibrate(call, call.attend(), sinks, 0.4).out, true, atol=1e-9)
    method = ACT(threshold=0.05, heads={0: [3, 1]}, skip_layers=(0, 0))
    found = method.after(call, call.attend())
    assert found is not None
    own = dense_sinks(p, 0.05)
    own[:, [0, 2]] = False
    assert torch.allclose(found.out, explicit(p, own, 0.4) @ call.v, atol=1e-9)


def test_beams_and_cropped_caches() -> None:
    """In mode "dynamic" the running means move with the beams; what cannot be undone is refused."""
    from transformers import DynamicCache

    model, other = tiny("llama"), torch.tensor([1, 0])
    results = []
    for swap in (False, True):
        method = ACT(beta=0.3, mode="dynamic", **LOW)
        with torch.no_grad(), regard.apply(model, method):
            cache = DynamicCache(config=model.config)
            model(IDS[:, :14], past_key_values=cache)
            if swap:
                cache.reorder_cache(other)
            ids = IDS[:, 14:]
            for t in range(6):
                step = (ids[other] if swap else ids)[:, t : t + 1]
                out = model(step, past_key_values=cache).logits
            results.append(out[other] if swap else out)
            cache.crop(-4)
            with pytest.raises(InputError, match="cropped"):
                model(IDS[:, 16:17], past_key_values=cache)
    assert torch.allclose(results[0], results[1], atol=1e-6)
    method = ACT(beta=0.3, **LOW)
    with torch.no_grad(), regard.apply(model, method):
        beams = model.generate(IDS[:1, :14], num_beams=3, max_new_tokens=5, do_sample=False)
    assert beams.shape[1] > 14


def test_a_new_turn_adds_its_sinks() -> None:
    model, method = tiny("llama"), ACT(beta=0.3, **LOW)
    with torch.no_grad(), regard.apply(model, method):
        cache = model(IDS[:, :8], use_cache=True).past_key_values
        first = method.found()[0]
        model(IDS[:, 8:9], past_key_values=cache)
        model(IDS[:, 9:], past_key_values=cache)
        second = method.found()[0]
    assert torch.equal(second[..., :8], first) and not bool(second[..., 8].any())
    assert second.shape[-1] == 20 and bool(second[..., 9:].any())


def test_few_rows_and_many_sinks() -> None:
    model, method = tiny("llama"), ACT(beta=0.3, min_rows=5, **LOW)
    with torch.no_grad(), regard.apply(model, method):
        model(IDS)
    assert not bool(method.found()[0][..., -4:].any())
    long = torch.randint(3, 100, (1, 60), generator=torch.Generator().manual_seed(0))
    method = ACT(alpha=0.9, skip_layers=(0, 0))
    with (
        torch.no_grad(),
        regard.apply(model, method),
        pytest.warns(UserWarning, match="raise alpha"),
    ):
        model(long)
        model(long)


def test_a_prompt_read_without_act() -> None:
    model = tiny("llama")
    with torch.no_grad():
        cache = model(IDS[:, :8], use_cache=True).past_key_values
        with (
            regard.apply(model, ACT(**LOW)),
            pytest.raises(InputError, match="before the prompt is read"),
        ):
            model(IDS[:, 8:9], past_key_values=cache)


def test_memory_does_not_grow_with_the_square() -> None:
    """8k tokens in one head stay under 200 MB, finding the sinks included: the map alone would take
    256 MB.
    """
    q, k, v = (
        torch.randn(1, 1, 8192, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3)
    )
    site = Site(0, "layer", 0, "layers", "self")
    call = Call(site, q, k * 2, v, Mask.causal(), 0.25)
    state: State = attend(q, call.k, v, mask=Mask.causal())
    method = ACT(alpha=2.0, skip_layers=(0, 0))
    with (
        torch.profiler.profile(profile_memory=True) as seen,
        pytest.warns(UserWarning, match="sinks"),
    ):
        method.after(call, state)
    assert int(method.found()[0].sum()) > 800
    live = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < 200e6
