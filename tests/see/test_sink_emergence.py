"""Sink rates and probes: closed forms, dense maps, and the known answers of a real model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import regard
from regard.errors import InputError
from regard.see.sink_emergence.method import (
    hidden_sinks,
    inputs,
    per_sequence,
    sink_map,
    sink_rate,
    sink_rates,
    sinks,
    stacked,
    uniform_alpha,
)
from regard.zoo import text, tiny


def dense(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The eager maps, `[batch, layers, heads, queries, keys]`."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(maps, 1)


def averaged(maps: torch.Tensor) -> torch.Tensor:
    """alpha as the paper writes it: the mean of column k over the rows k..T."""
    total = maps.shape[-1]
    return maps.sum(-2) / torch.arange(total, 0, -1)


def between(values: torch.Tensor) -> float:
    """A threshold in the middle, away from every value, where rounding cannot decide."""
    low, high = values.flatten().sort().values[values.numel() // 2 - 1 :][:2]
    return float(low + high) / 2


def test_uniform_attention_gives_the_harmonic_mean() -> None:
    maps = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    assert uniform_alpha(64) == pytest.approx(0.0741, abs=5e-5)
    assert float(averaged(maps)[0]) == pytest.approx(uniform_alpha(64), rel=1e-6)
    with pytest.raises(InputError, match="at least 1"):
        uniform_alpha(0)


def test_threshold_comes_before_the_mean() -> None:
    # the mean map, 0.35, lies above the threshold; one of two sequences does
    alpha = torch.tensor([[[[0.6, 0.0]]], [[[0.1, 0.0]]]])
    assert sink_rate(alpha, 0.3) == 0.5
    assert per_sequence(alpha, 0.3).tolist() == [1.0, 0.0]
    assert float(sink_map(alpha)) == pytest.approx(0.35)
    assert sink_rates(alpha, 0.05).tolist() == [1.0, 0.0]


def test_a_watch_gives_what_sink_rate_wants() -> None:
    model, ids = tiny("llama"), torch.arange(3, 43).view(2, 20)
    with regard.watch(model, facts=["mean_received"]) as seen:
        model(ids)
    alpha = averaged(dense(model, ids))
    assert torch.allclose(stacked(seen["mean_received"]), alpha, atol=1e-6)
    epsilon = between(alpha[..., 0])
    rate = float((alpha[..., 0] > epsilon).float().mean())
    assert 0.2 < rate < 0.8
    assert sink_rate(seen["mean_received"], epsilon) == pytest.approx(rate)


def test_hidden_sinks_leave_out_the_first_and_the_last() -> None:
    alpha = torch.zeros(1, 2, 3, 40)
    alpha[..., 0] = alpha[..., 39] = 0.9  # the sink itself, and a token that hardly anyone sees
    alpha[0, 0, :2, 7] = 0.5
    alpha[0, 1, 0, 9] = 0.4
    found = hidden_sinks(alpha)
    assert [(f["position"], f["heads"]) for f in found] == [(7, 2), (9, 1)]
    assert found[0]["alpha"] == pytest.approx(0.5)
    assert [f["position"] for f in hidden_sinks(alpha, tail=0)] == [39, 7, 9]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("position", [0, 5])
def test_sinks_equal_the_dense_maps(family: str, position: int) -> None:
    model = tiny(family)
    ids = torch.randint(3, 120, (5, 24), generator=torch.Generator().manual_seed(1))
    alpha = averaged(dense(model, ids))
    epsilon = between(alpha[..., position])
    found = sinks(model, [ids[:2], ids[2:]], epsilon=epsilon, position=position)
    assert torch.allclose(found.alpha, alpha[..., position].mean(0), atol=1e-6)
    assert torch.allclose(found.mean_received, alpha.mean((0, 1, 2)), atol=1e-6)
    assert found.rate == pytest.approx(float((alpha[..., position] > epsilon).float().mean()))
    assert found.rate == pytest.approx(float(found.rates[position]))
    assert found.rate == pytest.approx(float(found.per_sequence.mean()))
    assert (found.sequences, found.tokens, found.layers) == (5, 24, [0, 1])


def test_probes_equal_their_plain_definitions() -> None:
    """Keys and queries caught at the attention function, and every pair written out."""
    from regard.reach import Call, Handler, Session

    caught: list[Call] = []

    class Catch(Handler):
        def after(self, call: Call, state: Any) -> None:
            caught.append(call)

    model, p = tiny("llama"), 2
    ids = torch.randint(3, 120, (3, 17))
    with Session(model, [Catch()]), torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    probes = sinks(model, ids, position=p).probes
    for layer, call in enumerate(caught):
        k, v = (x.repeat_interleave(2, 1) for x in (call.k, call.v))
        cosine = torch.cosine_similarity(call.q[:, :, :, None], k[:, :, None], dim=-1)
        product = call.q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None] * call.scale
        others = [n for n in range(17) if n != p]
        pairs = [(t, [j for j in others if j <= t]) for t in range(p + 1, 17)]
        for name, matrix in (("cosine", cosine), ("norms", product)):
            own = matrix[:, :, p + 1 :, p].mean((0, 2))
            rest = torch.stack([matrix[:, :, t, j].mean(-1) for t, j in pairs], -1).mean((0, 2))
            assert torch.allclose(getattr(probes, name)[layer], own, atol=1e-5)
            assert torch.allclose(getattr(probes, f"{name}_others")[layer], rest, atol=1e-5)
        for name, x in (("key", k), ("value", v)):
            norm = x.norm(dim=-1)
            mean = (norm[..., p] / norm[..., others].mean(-1)).mean(0)
            middle = (norm[..., p] / norm[..., others].median(-1).values).mean(0)
            assert torch.allclose(getattr(probes, f"{name}_ratio_mean")[layer], mean, atol=1e-5)
            # of 16 values `median` takes the lower middle one, the quantile their mean
            assert torch.allclose(getattr(probes, f"{name}_ratio")[layer], middle, rtol=0.2)
    norm = hidden[1].norm(dim=-1)  # after the first of two layers; the last one is normed already
    ratio = (norm[:, p] / norm[:, [n for n in range(17) if n != p]].mean(-1)).mean()
    assert float(probes.massive[0]) == pytest.approx(float(ratio), rel=1e-5)


def test_a_repeated_token_makes_all_states_equal_with_rope_but_not_with_learned_positions() -> None:
    ids = inputs("repeat", vocabulary=120, count=4, tokens=32, seed=3)
    equal, differing = sinks(tiny("llama"), ids).probes, sinks(tiny("gpt2"), ids).probes
    assert torch.allclose(equal.massive, torch.ones(2), atol=1e-4)
    assert torch.allclose(equal.value_ratio, torch.ones(2, 4), atol=1e-4)
    assert torch.allclose(equal.key_ratio, torch.ones(2, 4), atol=1e-4)
    assert not torch.allclose(differing.massive, torch.ones(2), atol=1e-2)


def test_on_a_repeated_token_rope_bounds_the_sink() -> None:
    """No weight exceeds e^2x / (e^2x + t - 1), with x the largest scaled |q||k| (the theory)."""
    model, ids = tiny("llama"), inputs("repeat", vocabulary=120, count=3, tokens=48)
    found = sinks(model, ids)
    x = (found.every["norms"].double())[..., None]  # equal states: one norm product a head
    t = torch.arange(1, 49)
    bound = ((2 * x).exp() / ((2 * x).exp() + t - 1)).mean(-1).mean(0)
    assert (found.alpha <= bound + 1e-6).all()


def test_without_positions_a_repeated_token_is_looked_at_uniformly() -> None:
    model, ids = tiny("llama"), inputs("repeat", vocabulary=120, count=2, tokens=40)
    rotary = model.model.rotary_emb
    rotary.forward, kept = (
        (  # NoPE: cos 1 and sin 0 turn no query and no key
            lambda x, position_ids: (
                torch.ones(1, position_ids.shape[-1], 16),
                torch.zeros(1, position_ids.shape[-1], 16),
            )
        ),
        rotary.forward,
    )
    try:
        found = sinks(model, ids)
    finally:
        rotary.forward = kept
    assert torch.allclose(found.alpha, torch.full((2, 4), uniform_alpha(40)), atol=1e-5)
    assert found.rate == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_out(side: str) -> None:
    model = tiny("gpt2")  # learned positions: a padded row would show at once
    ids = torch.randint(3, 120, (2, 20))
    alone = sinks(model, ids[:, :14])
    span = slice(6, 20) if side == "left" else slice(0, 14)
    padded = torch.zeros(2, 20, dtype=torch.long)
    mask = torch.zeros_like(padded)
    padded[:, span], mask[:, span] = ids[:, :14], 1
    found = sinks(model, {"input_ids": padded, "attention_mask": mask})
    assert torch.equal(found.alpha, alone.alpha)
    assert found.tokens == 14


def test_layers_and_json() -> None:
    model, ids = tiny("llama"), torch.arange(3, 43).view(2, 20)
    whole, part = sinks(model, ids), sinks(model, ids, layers=[1])
    assert part.layers == [1]
    torch.testing.assert_close(part.alpha, whole.alpha[1:], rtol=1e-5, atol=1e-6)
    plain = json.loads(json.dumps(whole.as_dict()))
    assert plain["alpha"] == whole.alpha.tolist()
    assert len(plain["probes"]["massive"]) == 2


def test_it_leaves_no_trace() -> None:
    model, ids = tiny("llama"), torch.arange(3, 43).view(2, 20)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    with torch.no_grad():
        before = model(ids).logits
        sinks(model, ids)
        with pytest.raises(InputError):
            sinks(model, ids, position=20)
        assert torch.equal(model(ids).logits, before)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epsilon": 0.0}, "above 0 and below 1"),
        ({"epsilon": 1.0}, "above 0 and below 1"),
        ({"position": 20}, "out of range"),
        ({"position": -1}, "at least 0"),
        ({"tokens": 21}, "has 20 tokens where 21"),
        ({"tokens": 1}, "at least 2"),
        ({"layers": [7]}, "out of range"),
        ({"batches": []}, "no sequence"),
        ({"batches": torch.zeros(2, 1, dtype=torch.long)}, "looks at itself"),
        ({"batches": [torch.zeros(1, 9).long(), torch.zeros(1, 8).long()]}, "differ in length"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], said: str) -> None:
    asked = {"batches": torch.arange(3, 43).view(2, 20), **change}
    with pytest.raises(InputError, match=said):
        sinks(tiny("llama"), asked.pop("batches"), **asked)


def test_ragged_batches_are_refused_without_a_length() -> None:
    ids, mask = torch.arange(3, 43).view(2, 20), torch.ones(2, 20)
    mask[0, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(InputError, match="tokens=N"):
        sinks(tiny("llama"), batch)
    assert sinks(tiny("llama"), batch, tokens=15).tokens == 15


@pytest.mark.parametrize(("family", "said"), [("bert", "looks ahead"), ("t5", "encoder")])
def test_models_that_are_not_causal_are_refused(family: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        sinks(tiny(family), torch.arange(3, 23)[None])


class Words:
    """A tokenizer of bytes, with a start token if asked."""

    def __init__(self, bos: int | None = None, puts: bool = True) -> None:
        self.bos_token_id, self.puts = bos, puts

    def __len__(self) -> int:
        return 100

    def __call__(self, words: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = (
            [self.bos_token_id] if self.puts and add_special_tokens and self.bos_token_id else []
        )
        return {"input_ids": [*begin, *(ord(c) % 100 for c in words)]}


def test_windows_follow_each_other_and_begin_as_the_tokenizer_does() -> None:
    plain = inputs("text", text="abcdefghij", tokenizer=Words(), count=3, tokens=3)
    assert plain.flatten().tolist() == [ord(c) % 100 for c in "abcdefghi"]
    begun = inputs("text", text="abcdefghij", tokenizer=Words(1), count=3, tokens=3)
    assert begun[:, 0].tolist() == [1, 1, 1]
    assert begun[:, 1:].flatten().tolist() == [ord(c) % 100 for c in "abcdef"]
    # a start token that exists, but is not put before a text
    kept = inputs("text", text="abcdefghij", tokenizer=Words(1, False), count=3, tokens=3)
    assert torch.equal(kept, plain)
    with pytest.raises(InputError, match="too few for 4 windows"):
        inputs("text", text="abcdefghij", tokenizer=Words(), count=4, tokens=3)


def test_random_and_repeated_ids() -> None:
    drawn = inputs("random", vocabulary=50, count=20, tokens=30, seed=1)
    assert drawn.shape == (20, 30) and drawn.max() < 50 and len(drawn.unique()) > 40
    assert torch.equal(drawn, inputs("random", vocabulary=50, count=20, tokens=30, seed=1))
    assert not torch.equal(drawn, inputs("random", vocabulary=50, count=20, tokens=30, seed=2))
    same = inputs("repeat", vocabulary=50, count=20, tokens=30)
    assert (same == same[:, :1]).all() and len(same[:, 0].unique()) > 5
    with pytest.raises(InputError, match="Did you mean 'repeat'"):
        inputs("repeated", vocabulary=50)
    with pytest.raises(InputError, match="vocabulary"):
        inputs("random")
    with pytest.raises(InputError, match="text="):
        inputs("text")


@pytest.mark.slow
@pytest.mark.real
def test_known_answers_of_smollm2(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ranges = {"text": (0.60, 0.95), "random": (0.55, 0.90), "repeat": (0.0, 0.005)}
    found = {}
    for kind, (low, high) in ranges.items():
        ids = inputs(
            kind,
            vocabulary=None if kind == "text" else model.config.vocab_size,
            text=text("northanger-abbey"),
            tokenizer=tokenizer,
            count=8,
        )
        found[kind] = sinks(model, ids)
        assert low <= found[kind].rate <= high, (kind, found[kind].rate)
    assert float(found["text"].probes.massive.max()) > 50
    assert float(found["repeat"].probes.massive.max()) == pytest.approx(1, abs=1e-3)
    heads, probes = found["text"].sink_heads, found["text"].probes
    assert float((probes.cosine - probes.cosine_others)[heads].mean()) > 0.25
    assert float(probes.key_ratio[heads].mean()) < 0.6
    assert float(probes.value_ratio[heads].mean()) < 0.6
