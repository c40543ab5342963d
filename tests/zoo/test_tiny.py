"""Every tiny family builds, runs, and shows what its family is in the zoo for."""

from __future__ import annotations

import time

import pytest
import torch

from regard.errors import InputError
from regard.zoo.tiny import CAUSAL_LMS, FAMILIES, WINDOW, inputs, tiny

NO_MASK = ("vit", "whisper")


@pytest.mark.parametrize("family", FAMILIES)
def test_family_builds_and_runs(family: str) -> None:
    import transformers

    del transformers  # imported first, so that its own loading does not count
    start = time.perf_counter()
    model = tiny(family)
    assert time.perf_counter() - start < 10  # generous: the first one loads its modeling file
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        batch = inputs(family, model, padding=0 if family in NO_MASK else 3)
        output = model(**batch)
        again = model(**batch)
    assert torch.isfinite(output[0]).all()
    assert output[0].shape[0] == 2
    assert output[0].std() > 0.05
    assert torch.equal(output[0], again[0])


@pytest.mark.parametrize("family", ["llama", "whisper", "gpt_oss"])
def test_seed_decides_the_weights_and_random_state_is_kept(family: str) -> None:
    before = torch.random.get_rng_state()
    one, same, other = tiny(family, 1), tiny(family, 1), tiny(family, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [list(m.parameters()) for m in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


@pytest.mark.parametrize("family", [f for f in CAUSAL_LMS if f != "gpt_oss"])
def test_attention_is_far_from_uniform(family: str) -> None:
    """A wrong mask or a lost head must show, so the maps may not be nearly flat."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs(family, model, length=24), output_attentions=True).attentions
    # Average over the rows that see many keys: flat rows of 24 would have a largest weight of 1/24.
    assert all(layer[:, :, -1].max(-1).values.mean() > 0.15 for layer in maps)


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_later_tokens_do_not_reach_earlier_outputs(family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model)
    with torch.no_grad():
        before = model(**batch).logits
        batch["input_ids"][:, -1] = 5
        after = model(**batch).logits
    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-5)
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-5)


@pytest.mark.parametrize(("family", "reach"), [("mistral", 2 * (WINDOW - 1)), ("llama", 10**6)])
def test_window_limits_what_is_seen(family: str, reach: int) -> None:
    """Two layers of window n carry a token at most 2 (n - 1) places; a full layer any distance."""
    model = tiny(family)
    batch = inputs(family, model, batch=1, length=40)
    with torch.no_grad():
        before = model(**batch).logits[0]
        batch["input_ids"][0, 0] = (batch["input_ids"][0, 0] + 1 - 3) % 100 + 3
        moved = (model(**batch).logits[0] - before).abs().amax(-1) > 1e-6
    assert moved.nonzero().max() == min(reach, 39)


def test_families_carry_their_peculiarities() -> None:
    assert tiny("gemma2").config.attn_logit_softcapping == 5.0
    assert set(tiny("gemma3").config.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny("gpt_oss").model.layers[0].self_attn.sinks.abs().max() > 0.1
    assert tiny("qwen3").config.num_key_value_heads < tiny("qwen3").config.num_attention_heads


def test_inputs_pad_the_asked_side() -> None:
    model = tiny("llama")
    left = inputs("llama", model, padding=3)["attention_mask"]
    right = inputs("llama", model, padding=3, side="right")["attention_mask"]
    assert left[0, :3].sum() == 0 and left.sum() == 2 * 12 - 3
    assert right[0, -3:].sum() == 0 and right.sum() == 2 * 12 - 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny("lama"), "Did you mean 'llama'"),
        (lambda: inputs("lama", None), "Did you mean 'llama'"),
        (lambda: inputs("llama", None, side="up"), "'left' or 'right'"),
        (lambda: inputs("llama", None, padding=12), "less than the length"),
    ],
)
def test_wrong_arguments_are_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
