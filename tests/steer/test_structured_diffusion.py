"""Structured guidance equals its definition, on one half only; without phrases it is nothing."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.steer.structured_diffusion.method import StructuredDiffusion
from regard.zoo.tiny_diffusion import tiny_pipeline

from .. import pipelines

PROMPT = "a red circle and a blue zebra"
PHRASES = ["a red circle", "a blue zebra"]
run = partial(pipelines.run, prompt=PROMPT)


def method(**settings: Any) -> StructuredDiffusion:
    return StructuredDiffusion(**({"parser": "rules"} | settings))


# -- the definition, written out on matrices in float64 --------------------------------------------
def encodings(pipe: Any, phrases: list[str] = PHRASES) -> list[torch.Tensor]:
    """c_0 and c~_i, with spans found by comparing ids."""
    with torch.no_grad():
        whole, *alone = (
            pipe.encode_prompt(t, "cpu", 1, False)[0][0].double() for t in (PROMPT, *phrases)
        )
    ids, out = pipe.tokenizer(PROMPT).input_ids, [whole]
    for phrase, own in zip(phrases, alone):
        part = pipe.tokenizer(phrase).input_ids[1:-1]
        at = next(n for n in range(len(ids)) if ids[n : n + len(part)] == part)
        one = whole.clone()
        one[at : at + len(part)] = own[1 : 1 + len(part)]
        out.append(one)
    return out


def expected(call: Call, module: Any, contexts: list[torch.Tensor], mode: str) -> torch.Tensor:
    """The conditional row's output, `[heads, queries, head_dim]`."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (module.heads, -1)).transpose(0, 1)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = call.q[1].double()
        return (call.scale * q @ heads(k).transpose(-1, -2)).softmax(-1) @ heads(v)

    key, value = module.to_k.weight.double(), module.to_v.weight.double()
    if mode == "values":
        outs = [attend(contexts[0] @ key.T, c @ value.T) for c in contexts]
    else:
        joined = contexts[0].clone()
        for c in contexts[1:]:
            changed = (c != contexts[0]).any(-1)
            joined[changed] = c[changed]
        keys = [joined if mode == "compat" else contexts[0], *contexts[1:]]
        outs = [attend(k @ key.T, joined @ value.T) for k in keys]
    return torch.stack(outs).mean(0)


@pytest.mark.parametrize(
    "mode, settings",
    [
        ("values", {}),
        ("values", {"fused": False}),
        ("keys", {"conjunction": True}),
        ("compat", {"conjunction": True, "variant": "released"}),
    ],
)
def test_every_call_equals_the_definition(sd: Any, mode: str, settings: dict[str, Any]) -> None:
    modules, contexts, seen = dict(sd.unet.named_modules()), encodings(sd), []

    class Check(Handler):
        def after(self, call: Call, state: State) -> None:
            if call.site.kind == "cross":
                want = expected(call, modules[call.site.name], contexts, mode)
                assert torch.allclose(state.out[1].double(), want, atol=2e-5)
                plain = (call.scale * call.q @ call.k.transpose(-1, -2)).softmax(-1)
                seen.append(float((plain[1] @ call.v[1] - want.float()).abs().max()))

    run(sd, method(**settings), Check())
    assert len(seen) == 2 * sum("attn2" in n for n in sd.unet.attn_processors)


def test_fused_equals_explicit(sd: Any) -> None:
    one, many, plain = run(sd, method()), run(sd, method(fused=False)), run(sd)
    assert np.abs(one - many).max() < 2e-5
    assert np.abs(one - plain).max() > 1e-3


def test_fused_projections_give_the_same(sd: Any) -> None:
    pipe = tiny_pipeline("sd")
    pipe.unet.fuse_qkv_projections()
    for settings in ({}, {"conjunction": True}):
        assert np.abs(run(pipe, method(**settings)) - run(sd, method(**settings))).max() < 2e-5


@pytest.mark.parametrize("settings", [{}, {"fused": False}, {"conjunction": True}])
def test_without_phrases_the_image_is_the_plain_one(sd: Any, settings: dict[str, Any]) -> None:
    plain = sd(
        "circle",
        generator=[torch.Generator().manual_seed(0)],
        num_inference_steps=2,
        output_type="np",
    ).images
    with pytest.warns(UserWarning, match="no noun phrase of two words or more in 'circle'"):
        assert np.array_equal(run(sd, method(**settings), prompt="circle"), plain)


def test_the_neutral_settings_give_the_plain_image_without_a_word(sd: Any) -> None:
    from regard.steer.structured_diffusion.card import CARD

    one = method(**CARD.neutral)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(run(sd, one), run(sd))
    assert one.report() == {"prompts": [{"prompt": PROMPT, "phrases": [], "skipped": []}]}


def test_a_phrase_that_is_the_whole_prompt_changes_nothing(sd: Any) -> None:
    plain = run(sd, prompt="a red circle.")
    with pytest.warns(UserWarning, match="no noun phrase"):
        assert np.array_equal(run(sd, method(), prompt="a red circle."), plain)


def test_the_half_without_the_prompt_is_untouched(sd: Any) -> None:
    log: list[torch.Tensor] = []

    class Keep(Handler):
        def after(self, call: Call, state: State) -> None:
            if call.site.kind == "cross" and call.denoising.step == 0:
                log.append(state.out)

    for settings in ({}, {"conjunction": True}):
        log.clear()
        run(sd, Keep())
        run(sd, method(**settings), Keep())
        half = len(log) // 2
        # layers behind the first see other latents in the prompt's half, never in the other one
        for a, b in zip(log[:half], log[half:]):
            assert torch.allclose(a[0], b[0], atol=1e-6)
        assert not torch.allclose(log[0][1], log[half][1], atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"fused": False}, {"conjunction": True}])
def test_batch_is_alone(sd: Any, settings: dict[str, Any]) -> None:
    """Prompts with two, none and three phrases: each averages over its own count."""
    prompts = [PROMPT, "circle", "a red cat, a green dog and a big sheep"]
    with pytest.warns(UserWarning, match="no noun phrase"):
        together = run(sd, method(**settings), prompt=prompts)
    for n, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(n)
        one = method(**settings)
        if prompt == "circle":
            handlers: list[Handler] = []
        else:
            handlers = [one]
        with regard.apply(sd, *handlers):
            alone = sd(prompt, generator=noise, num_inference_steps=2, output_type="np").images
        assert np.abs(together[n] - alone[0]).max() < 1e-4


def test_images_per_prompt_and_no_guidance(sd: Any) -> None:
    two = run(sd, method(), num_images_per_prompt=2)
    assert np.abs(two[0] - run(sd, method())[0]).max() < 1e-4
    off = run(sd, method(), guidance_scale=1.0)
    assert np.abs(off - run(sd, guidance_scale=1.0)).max() > 1e-4
    assert np.abs(off - run(sd, method(fused=False), guidance_scale=1.0)).max() < 2e-5


def test_leaves_no_trace(sd: Any) -> None:
    before = run(sd)
    run(sd, method())
    assert np.array_equal(run(sd), before)
    assert "encode_prompt" not in vars(sd)


def test_what_was_used(sd: Any) -> None:
    one = method()
    run(sd, one)
    structure = one.used[PROMPT]
    assert [p.text for p in structure.phrases] == PHRASES and not structure.skipped
    for got, want in zip(structure.contexts, encodings(sd)):
        assert torch.allclose(got.double(), want, atol=1e-5)
    # a phrase of its own choice, and one that stands twice
    given = method(phrases=["a red circle"])
    run(sd, given, prompt="a red circle and a red circle")
    assert [p.start for p in given.used["a red circle and a red circle"].phrases] == [0]
    twice = method(phrases=["a red circle"] * 2)
    run(sd, twice, prompt="a red circle and a red circle")
    assert [p.start for p in twice.used["a red circle and a red circle"].phrases] == [0, 17]


def test_inner_phrases_lie_on_top_in_the_conjunction(sd: Any) -> None:
    """Outer before inner: the inner one's rows win in the joined context."""

    def nested(text: str) -> list[tuple[int, int]]:
        return [(text.index("red cat"), text.index("red cat") + 7), (0, text.index(" and"))]

    one = method(parser=nested, conjunction=True)
    run(sd, one, prompt="a red cat with a ball and a star")
    structure = one.used["a red cat with a ball and a star"]
    assert [p.text for p in structure.phrases] == ["a red cat with a ball", "red cat"]
    outer, inner = structure.contexts[1], structure.contexts[2]
    assert torch.equal(structure.joined[2:4], inner[2:4])
    assert torch.equal(structure.joined[4:7], outer[4:7])
    assert not torch.allclose(outer[2:4], inner[2:4], atol=1e-4)


def test_phrases_named_from_the_inside_out_are_as_from_the_outside_in(sd: Any) -> None:
    text, phrases = "a red cat with a ball and a star", ["red cat", "a red cat with a ball"]
    images = [
        run(sd, method(phrases=given, conjunction=True), prompt=text)
        for given in (phrases, phrases[::-1])
    ]
    assert np.array_equal(*images)
    one = method(phrases=phrases, conjunction=True)
    run(sd, one, prompt=text)
    structure = one.used[text]
    assert [p.text for p in structure.phrases] == phrases[::-1]
    assert torch.equal(structure.joined[2:4], structure.contexts[2][2:4])


def test_phrases_behind_the_limit_are_left_out_by_name(sd: Any) -> None:
    long = "a red circle, " + "very " * 16 + "far behind them all stands a blue square"
    one = method(phrases=["a red circle", "a blue square"])
    with pytest.warns(UserWarning, match="'a blue square' is beyond the text encoder"):
        run(sd, one, prompt=long)
    assert [p.text for p in one.used[long].phrases] == ["a red circle"]


def test_word_maps_beside_it(sd: Any) -> None:
    """Keys stay the prompt's own, so maps of the first step are those of the plain run."""
    from regard.parts.diffusion.words import WordMaps

    plain, beside = (
        WordMaps(["circle"], steps=(0, 1), layers=[0]),
        WordMaps(["circle"], steps=(0, 1), layers=[0]),
    )
    run(sd, plain)
    run(sd, method(), beside)
    assert torch.allclose(plain["circle"], beside["circle"], atol=1e-6)


def test_bad_input(sd: Any) -> None:
    for bad, match in (
        ({"parser": "spacey"}, "Did you mean 'spacy'"),
        ({"phrases": "a red circle"}, "phrases is a list"),
        ({"phrases": [" "]}, "the phrases are empty"),
        ({"variant": "released"}, "needs conjunction=True"),
    ):
        with pytest.raises(InputError, match=match):
            method(**bad)
    with pytest.raises(InputError, match="phrase 'a green dog' is not found in prompt"):
        run(sd, method(phrases=["a green dog"]))
    with pytest.raises(InputError, match="not found a second time"):
        run(sd, method(phrases=["a red circle"] * 2))
    alone = regard.apply(sd.unet, method())
    with torch.no_grad(), pytest.raises(InputError, match="pass the whole pipeline"), alone:
        sd.unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 24, 32))
    embeds = sd.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    session = regard.apply(sd, method())
    with pytest.raises(InputError, match="give it the prompt as text"), session:
        sd(prompt_embeds=embeds, num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ReachError, match="this model has none"):
        regard.apply(tiny_pipeline("sd3"), method())
