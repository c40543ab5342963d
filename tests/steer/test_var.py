"""VAR: the merge form is the explicit edit; neutral, decoding, batches, presets, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import regard
from regard.core import Mask
from regard.core.kernels.reference import probabilities
from regard.errors import InputError, ReachError
from regard.reach import Call, Site
from regard.steer.var.claims import SinkKnockout
from regard.steer.var.dims import find_sink_dims, relative
from regard.steer.var.edit import redistribute
from regard.steer.var.method import VAR
from regard.zoo.tiny import tiny
from regard.zoo.tiny_vlm import IMAGE, tiny_vlm, vlm_inputs

from ..vlms import DIMS, SINK_WORD, TAU, alone, cast, planted, with_sink_words

SET: dict[str, Any] = {"tau": TAU, "dims": DIMS, "nonsink_ratio": 0.5}
FAMILIES = ["llava", "qwen2_vl", "qwen3_vl"]


def explicit(
    p: Tensor, image: Tensor, sinks: Tensor, rows: Tensor, s: VAR
) -> tuple[Tensor, Tensor]:
    """The card's edit, row by row, on the map `[batch, heads, queries, keys]`; and which rows."""
    edited, chosen = p.clone(), torch.zeros(p.shape[:3], dtype=torch.bool)
    released = s.variant == "released"
    for b in range(len(p)):
        v, d = image[b], sinks[b]
        if released and not bool((v & d).any()):
            continue
        for h in range(p.shape[1]):
            for i in rows[b].nonzero()[:, 0].tolist():
                row = p[b, h, i]
                m, free = float(row[v].sum()), float(row[v & ~d].sum())
                if free <= 0:
                    continue
                if s.heads != "all":
                    if m < s.image_mass:
                        continue
                    if released:
                        share = float(row[v & d].sum()) / (m + 1e-6 * int(v.sum()))
                        if share > 1 - s.nonsink_ratio:
                            continue
                    elif free / m < s.nonsink_ratio:
                        continue
                taker = {"image": v & ~d, "text": ~v & ~d, "both": ~d}[s.give]
                omega = s.move * float(row[d].sum())
                new = row.clone()
                new[d] = (1 - s.move) * row[d]
                new[taker] = row[taker] * (1 + omega / row[taker].sum())
                edited[b, h, i], chosen[b, h, i] = new, True
    return edited, chosen


@contextmanager
def dense(model: Any, inputs: dict[str, Any], s: VAR, layers: list[int]) -> Iterator[list[Tensor]]:
    """The model with an eager attention function of the test's own that edits the whole map."""
    ids, live = inputs["input_ids"], inputs["attention_mask"].bool()
    image, body = ids == IMAGE, model.get_decoder()
    state: dict[str, Any] = {}
    picked: list[Tensor] = []
    number = {id(layer.self_attn): n for n, layer in enumerate(body.layers)}

    def look(layer: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        phi = x[..., list(DIMS)].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
        state["sinks"] = (phi >= s.tau) & live

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        p = scores.softmax(-1)
        n = number.get(id(module))
        if n in layers:
            p, chosen = explicit(p, image, state["sinks"], ~image & live, s)
            picked.append(chosen)
        return (p @ value).transpose(1, 2), None

    AttentionInterface.register("dense_var", attention)
    AttentionMaskInterface.register("dense_var", eager_mask)
    own = copy.deepcopy(model)
    own.set_attn_implementation("dense_var")
    number = {id(layer.self_attn): n for n, layer in enumerate(own.get_decoder().layers)}
    hooks = [
        layer.register_forward_pre_hook(look, with_kwargs=True)
        for layer in own.get_decoder().layers
    ]
    yield picked  # type: ignore[misc]
    with torch.no_grad():
        state["logits"] = own(**inputs).logits
    picked.append(state["logits"])
    for hook in hooks:
        hook.remove()


def a_call(dtype: torch.dtype = torch.float64) -> tuple[Call, Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 31, 8, generator=make, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 31, 8, generator=make, dtype=torch.float64) for _ in range(2))
    k[:, :, 0] = q.mean((1, 2))[:, None] * 5
    image = torch.zeros(2, 31, dtype=torch.bool)
    image[0, 4:15] = image[1, 8:19] = True
    sinks = torch.zeros(2, 31, dtype=torch.bool)
    sinks[:, 0] = True
    sinks[0, [7, 9]] = sinks[1, [10, 25]] = True
    site = Site(0, "layer", 0, "layers", "self")
    q, k, v = (t.to(dtype) for t in (q, k, v))
    return Call(site, q, k, v, Mask.causal(), 8**-0.5), image, sinks


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"move": 1.0, "nonsink_ratio": 0.9},
        {"variant": "released", "nonsink_ratio": 0.5},
        {"heads": "all", "give": "text"},
        {"give": "both", "nonsink_ratio": 0.0, "image_mass": 0.0},
    ],
)
def test_merge_form_is_the_explicit_edit(settings: dict[str, Any]) -> None:
    s = VAR(dims=[0], **settings)
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        call, image, sinks = a_call(dtype)
        bias = torch.randn(1, 4, 31, 31, generator=torch.Generator().manual_seed(2)).to(dtype)
        kept = torch.arange(31)[None] >= torch.tensor([[0], [3]])
        for mask, b in (
            (Mask.causal(), None),
            (Mask.causal() & Mask.padding(kept), bias),
            (Mask.causal() & Mask.window(17), None),
        ):
            own = call.change(mask=mask, bias=b)
            p = probabilities(own.q, own.k, mask, own.scale, bias=b).double()
            true, rows = explicit(p, image, sinks, torch.ones(2, 31, dtype=torch.bool), s)
            found, chosen, moved = redistribute(own, own.attend(), image, sinks, s)
            want = true @ own.v.double().repeat_interleave(2, 1)
            assert float((found.out.double() - want).abs().max()) < bar
            assert torch.equal(chosen, rows) and bool(rows.any()) and not bool(rows.all())
            # the image gains exactly what the sinks lose
            if s.give == "image":
                gain = ((true - p) * (image & ~sinks)[:, None, None]).sum(-1)
                assert torch.allclose(gain, moved.double(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_model_is_that_of_an_eager_edit(family: str, variant: str) -> None:
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        model = planted(family, dtype=dtype)
        inputs = with_sink_words(cast(vlm_inputs(family, model, images=[1, 2, 0]), dtype))
        method = VAR(variant=variant, **SET)
        layers = [2, 3] if variant == "released" else [0, 1, 2]
        with dense(model, inputs, method, layers) as true:
            pass
        with torch.no_grad(), regard.apply(model, method):
            logits = model(**inputs).logits
            plain_found = method.found()
        real = inputs["attention_mask"].bool()
        size = float(true[-1][real].abs().max())
        assert float((logits - true[-1])[real].abs().max()) < bar * max(size, 1)
        assert sorted(plain_found) == layers
        if dtype == torch.float64:
            for n, chosen in zip(layers, true[:-1]):
                assert torch.equal(plain_found[n].chosen[0], chosen)
        image = inputs["input_ids"] == IMAGE
        last = plain_found[layers[-1]]
        assert bool((last.sinks & image).any()) and bool((last.sinks & ~image & real).any())
        assert bool(last.chosen[0].any()) and not bool(last.chosen[0][:2].all())
        assert not bool(last.chosen[0][2].any())  # the row without image


@pytest.mark.parametrize("family", FAMILIES)
def test_move_zero_is_the_plain_model_and_no_trace_is_left(family: str) -> None:
    model = planted(family)
    inputs = with_sink_words(vlm_inputs(family, model, images=[1, 1]))
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with torch.no_grad():
        plain = model(**inputs).logits
        with regard.apply(model, VAR(move=0.0, **SET)):
            assert torch.equal(model(**inputs).logits, plain)
        with regard.apply(model, VAR(**SET)):
            changed = model(**inputs).logits
        assert float((changed - plain)[:, -1].abs().max()) > 1e-3
        # queries before and inside the image never change
        assert torch.equal(changed[:, :10], plain[:, :10])
        assert torch.equal(model(**inputs).logits, plain)
    assert hooks == sum(len(m._forward_pre_hooks) for m in model.modules())


def step(model: Any, out: Any, token: Tensor, mask: Tensor) -> Any:
    positions = (mask.cumsum(-1) - 1)[:, -1:]
    if hasattr(model.model, "rope_deltas"):
        positions = (positions + model.model.rope_deltas).expand(3, -1, -1)
    return model(
        input_ids=token,
        attention_mask=mask,
        past_key_values=out.past_key_values,
        position_ids=positions,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_last_token_gives_is_told_before_and_after(family: str) -> None:
    """Of the first layer, where nothing came before: the plain map, and the card's edit of it."""
    model = planted(family)
    inputs = with_sink_words(vlm_inputs(family, model))
    method = VAR(**{**SET, "image_mass": 0.0}, layers=[0])
    method.prepare(model, inputs)
    with torch.no_grad(), regard.apply(model, method):
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        p = model(**inputs, output_attentions=True).attentions[0]
    found, last = method.found()[0], torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    last[:, -1] = True
    edited, chosen = explicit(p, found.image, found.sinks, last, method)
    assert bool(chosen[:, :, -1].any()) and not torch.allclose(edited[:, :, -1], p[:, :, -1])
    assert torch.allclose(method.last_before[0], p[:, :, -1], atol=1e-6)
    assert torch.allclose(method.last_after[0], edited[:, :, -1], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_decode(family: str) -> None:
    model = planted(family, dtype=torch.float64)
    inputs = with_sink_words(cast(vlm_inputs(family, model, images=[1, 2]), torch.float64))
    mask = inputs["attention_mask"]
    cut = mask.shape[1] - 3
    first = {
        n: x[:, :cut] if n in ("input_ids", "attention_mask", "mm_token_type_ids") else x
        for n, x in inputs.items()
    }
    if "llava" in family:
        first["position_ids"] = (first["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), regard.apply(model, method := VAR(**SET)):
        whole = model(**inputs).logits
        assert not any(bool(f.sinks[:, cut:].any()) for f in method.found().values())
        kept = {n: f.sinks[:, :cut] for n, f in method.found().items()}
        out = model(**first, use_cache=True)
        for t in range(cut, mask.shape[1]):
            out = step(model, out, inputs["input_ids"][:, t : t + 1], mask[:, : t + 1])
            assert torch.allclose(out.logits[:, -1], whole[:, t], atol=1e-10)
        for n, f in method.found().items():
            assert torch.equal(f.sinks[:, :cut], kept[n]) and f.sinks.shape[1] == mask.shape[1]
            assert len(f.chosen) == 4


def test_a_generated_sink_word_is_no_sink() -> None:
    model = planted("llava")
    inputs = with_sink_words(vlm_inputs("llava", model, images=[1]))
    with torch.no_grad(), regard.apply(model, method := VAR(**SET)):
        out = model(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        step(model, out, torch.tensor([[SINK_WORD]]), mask)
        assert not bool(method.found()[0].sinks[:, -1].any())


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_alone(family: str) -> None:
    model, images = planted(family, dtype=torch.float64), [1, 2, 0]
    inputs = with_sink_words(cast(vlm_inputs(family, model, images=images), torch.float64))
    mask = inputs["attention_mask"]
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "llava" in family else {}
    with torch.no_grad(), regard.apply(model, VAR(**SET)):
        together = model(**inputs, **extra).logits
        for row in range(3):
            with pytest.warns(UserWarning, match="no image") if row == 2 else _nothing():
                own = model(**alone(family, inputs, row, images)).logits
            n = own.shape[1]
            assert torch.allclose(together[row, -n:], own[0], atol=1e-9)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_generation_and_beams() -> None:
    model = planted("llava")
    inputs = with_sink_words(vlm_inputs("llava", model, images=[1, 2]))
    model.generation_config.eos_token_id = None
    with torch.no_grad(), regard.apply(model, VAR(move=1.0, **SET)):
        greedy = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(5):  # the same without a cache: the sinks of the prompt are the same
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions,
                pixel_values=inputs["pixel_values"], use_cache=False,
            ).logits  # fmt: skip
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert torch.equal(greedy, ids)
        assert model.generate(**inputs, max_new_tokens=4, num_beams=2).shape[0] == 2


def test_the_two_names_of_p_and_rho() -> None:
    paper, code = VAR.paper(p=0.6, rho=0.8), VAR.released(p=0.6, rho=0.2)
    assert (paper.move, paper.nonsink_ratio, paper.variant) == (0.6, 0.8, "paper")
    assert (round(code.move, 9), round(code.nonsink_ratio, 9)) == (0.4, 0.8)
    # their older names
    assert VAR(rule="released_code").variant == VAR.released_code().variant == "released"
    assert VAR(preset="hallucination").nonsink_ratio == 0.5 and VAR().nonsink_ratio == 0.8
    # rho of the paper and of the code agree at 0.5 alone
    assert VAR.paper(rho=0.5).nonsink_ratio == VAR.released(rho=0.5).nonsink_ratio
    # a row without visual sinks: the rule recycles text sinks, the code does nothing
    model = tiny_vlm("llava")
    inputs = with_sink_words(vlm_inputs("llava", model, images=[1]))
    with torch.no_grad():
        model.get_decoder().embed_tokens.weight[SINK_WORD, DIMS[0]] = 60.0
        plain = model(**inputs).logits
        with regard.apply(model, paper_ := VAR.paper(rho=0.5, tau=6.5, dims=DIMS)):
            a = model(**inputs).logits
        with regard.apply(model, VAR.released(tau=6.5, dims=DIMS)):
            b = model(**inputs).logits
    assert not bool((paper_.found()[0].sinks & (inputs["input_ids"] == IMAGE)).any())
    assert torch.equal(b, plain) and not torch.allclose(a, plain, atol=1e-3)


def test_random_sinks_are_as_many_and_image_tokens() -> None:
    model = planted("llava")
    inputs = with_sink_words(vlm_inputs("llava", model, images=[1, 2]))
    with torch.no_grad():
        with regard.apply(model, true := VAR(**SET)):
            model(**inputs)
        with regard.apply(model, drawn := VAR(random_sinks=3, **SET)):
            model(**inputs)
    image = inputs["input_ids"] == IMAGE
    a, b = true.found()[0].sinks, drawn.found()[0].sinks
    assert torch.equal((a & image).sum(-1), (b & image).sum(-1)) and not torch.equal(a, b)
    assert torch.equal(a & ~image, b & ~image)


def test_knockout_hides_the_visual_sinks_from_the_text() -> None:
    """Checked by the audit: a changed value of a hidden key reaches no text token of that layer."""
    model = planted("llava", layers=2, dtype=torch.float64)
    inputs = with_sink_words(cast(vlm_inputs("llava", model, images=[1]), torch.float64))
    method = SinkKnockout(layers=[0, 1], **SET)
    image = inputs["input_ids"][0] == IMAGE
    seen: list[Tensor] = []

    class Look(regard.reach.Handler):
        def after(self, call: Call, state: Any) -> None:
            if "language_model" in call.site.name:
                p = probabilities(call.q, call.k, call.mask, call.scale)
                assert torch.allclose(p @ call.v.repeat_interleave(2, 1), state.out, atol=1e-9)
                seen.append(p)

    with torch.no_grad(), regard.apply(model, method, Look()):
        out = model(**inputs, use_cache=True)
        model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
    sinks = method.found()[0].sinks[0, :26] & image
    assert bool(sinks.any()) and len(seen) == 4
    for p in (seen[0][0], seen[2][0]):
        count = p.shape[1]
        text = ~image if count == 26 else torch.ones(1, dtype=torch.bool)
        assert float(p[:, text][:, :, :26][..., sinks].abs().max()) == 0
        assert torch.allclose(p.sum(-1), torch.ones(4, count, dtype=torch.float64))
    inside = seen[0][0][:, image][:, :, sinks]
    assert float(inside.max()) > 0  # the image itself still looks at them


def test_methods_that_move_tokens_are_refused() -> None:
    model = planted("llava")
    inputs = vlm_inputs("llava", model, images=[1])
    drop = regard.VisionDrop(cuts={1: (6, 2)})
    for methods in ((drop, VAR(**SET)), (VAR(**SET), drop), (drop, regard.MMA())):
        with torch.no_grad(), regard.apply(model, *methods), pytest.raises(ReachError):
            model(**inputs)


def test_dims_are_found() -> None:
    model = planted("llava", layers=8)
    prompts = [with_sink_words(vlm_inputs("llava", model, images=[1, 2], seed=n)) for n in range(2)]
    assert find_sink_dims(model, prompts) == [DIMS[0]]
    with pytest.raises(InputError, match="no massive activation"):
        find_sink_dims(tiny_vlm("llava"), prompts, z=7.9)


def test_phi_is_bounded() -> None:
    x = torch.zeros(1, 1, 400)
    x[..., 3] = 1e4
    assert math.isclose(float(relative(x, [3])), 20.0, rel_tol=1e-4)
    assert float(relative(x.bfloat16(), [3])) > 19.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"move": 1.5}, "move is a number of at least 0 and at most 1"),
        ({"nonsink_ratio": -0.1}, "nonsink_ratio is a number of"),
        ({"variant": "mine"}, "variant is one of"),
        ({"preset": "art"}, "preset is one of"),
        ({"dims": "auto", "tau": 4}, "call prepare"),
        ({"dims": "gpt-9"}, "no dims are known"),
        ({"dims": [64], "tau": 4}, "no dim 64"),
        ({"dims": [], "tau": 4}, "dims is empty"),
        ({"dims": [1], "tau": 8.0}, "bound is 8.0"),
        ({"tau": 4}, "find_sink_dims"),
        ({"dims": [1], "tau": 4, "layers": [7]}, "layer 7 is out of range"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    model = tiny_vlm("llava")
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(InputError, match=message), regard.apply(model, VAR(**settings)):
        pass
    assert hooks == sum(len(m._forward_pre_hooks) for m in model.modules())
    assert model.config.text_config._attn_implementation == "sdpa"


def test_models_and_caches_that_cannot_work() -> None:
    with pytest.raises(InputError, match="no images"), regard.apply(tiny("llama"), VAR(**SET)):
        pass
    model = planted("llava")
    inputs = vlm_inputs("llava", model, images=[1])
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        with regard.apply(model, VAR(**SET)), pytest.raises(InputError, match="read without VAR"):
            model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
        with regard.apply(model, VAR(**SET)), pytest.raises(InputError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 4, 64))
