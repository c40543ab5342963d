"""WAAD, FAI, peaks, couplings and perturbation: hand-made series, and dense maps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.see.preplan_anchor.coupling import content_words, couplings, jaccard, perturb
from regard.see.preplan_anchor.method import (
    Heads,
    Rhythm,
    calibrated,
    head_split,
    kurtosis,
    middle_layers,
    peaks,
    rhythm,
)
from regard.zoo import tiny

START, TOTAL = 12, 40


def ids(seed: int = 1, length: int = TOTAL) -> torch.Tensor:
    return torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(seed))


def dense(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The eager maps, `[layers, heads, queries, keys]`, in float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(tokens[None], output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack([m[0] for m in maps]).double()


def by_definition(
    maps: torch.Tensor, window: int, horizon: tuple[int, int | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Span [layers, heads], WAAD and FAI [layers, heads, response] written out as in the paper."""
    total = maps.shape[-1]
    t, s = torch.arange(total)[:, None], torch.arange(total)
    span = (maps * (t - s))[:, :, START:].sum(-1).mean(-1)
    waad = (maps * (t - s).clamp(max=window))[:, :, START:].sum(-1)
    low, high = horizon
    fai = torch.zeros(*maps.shape[:2], total - START, dtype=maps.dtype)
    for key in range(START, total):
        last = total - 1 if high is None else min(total - 1, key + high)
        rows = range(key + low, last + 1)
        if len(rows):
            fai[:, :, key - START] = maps[:, :, rows.start : rows.stop, key].mean(-1)
    return span, waad, fai


@pytest.mark.parametrize("horizon", [(0, None), (3, 9), (10, 50)])
@pytest.mark.parametrize("without", [False, True], ids=["whole", "without-token-0"])
def test_a_rhythm_equals_the_dense_maps(horizon: tuple[int, int | None], without: bool) -> None:
    model, tokens = tiny("llama"), ids()
    maps = dense(model, tokens)
    first = maps[:, :, START:, 0].mean(-1)
    if without:
        maps = maps.clone()
        maps[..., 0] = 0
        maps[:, :, 1:] /= maps[:, :, 1:].sum(-1, keepdim=True)
    span, waad, fai = by_definition(maps, 6, horizon)
    seen = rhythm(
        model, tokens, START, window=6, horizon=horizon, exclude_first=without, tail=4, quantile=0.3
    )
    assert torch.allclose(torch.tensor(seen.span).double(), span, atol=1e-4)
    order = span.flatten().argsort().tolist()
    near, far = ([(n // 4, n % 4) for n in part] for part in (order[:2], order[-2:]))
    assert (set(seen.local), set(seen.far)) == (set(near), set(far))

    def mean(values: torch.Tensor, heads: Any) -> torch.Tensor:
        return torch.stack([values[a, b] for a, b in heads]).mean(0)

    assert torch.allclose(torch.tensor(seen.waad).double(), mean(waad, near), atol=1e-5)
    assert torch.allclose(torch.tensor(seen.fai).double(), mean(fai, far), atol=1e-5)
    assert seen.counted == TOTAL - START - max(4, horizon[0])
    sharp = kurtosis(fai[:, :, : seen.counted]).flatten().argsort(descending=True)[:2].tolist()
    assert set(seen.receivers) == {(n // 4, n % 4) for n in sharp}
    receiver = mean(fai, [(n // 4, n % 4) for n in sharp])
    assert torch.allclose(torch.tensor(seen.receiver).double(), receiver, atol=1e-5)
    assert seen.sink_mass["global"] == pytest.approx(float(mean(first, far).mean()), abs=1e-5)
    if horizon[0]:  # nobody stands that far behind the last tokens
        assert seen.fai[-horizon[0] :] == [0.0] * horizon[0]


def test_entropy_is_that_of_the_distribution_a_token_was_drawn_from() -> None:
    model, tokens = tiny("llama"), ids()
    with torch.no_grad():
        p = model(tokens[None]).logits[0, START - 1 : TOTAL - 1].softmax(-1)
    expected = -(p * p.log()).sum(-1)
    assert torch.allclose(torch.tensor(rhythm(model, tokens, START).entropy), expected, atol=1e-5)


def test_a_window_of_one_counts_all_but_the_token_itself() -> None:
    model, tokens = tiny("llama"), ids()
    own = dense(model, tokens).diagonal(dim1=-2, dim2=-1)[:, :, START:]
    seen = rhythm(model, tokens, START, window=1)
    expected = 1 - torch.stack([own[a, b] for a, b in seen.local]).mean(0)
    assert torch.allclose(torch.tensor(seen.waad).double(), expected, atol=1e-5)


def test_peaks_are_strict_and_above_the_median() -> None:
    flat = torch.tensor([1.0, 2.0, 2.0, 1.0, 5.0, 1.0, 0.0, 0.5, 0.0])
    assert peaks(flat) == [4]  # a plateau is none, 0.5 lies below the median
    assert peaks(torch.tensor([9.0, 1.0, 2.0, 1.0, 9.0])) == []  # ends, and one at the median
    assert peaks(torch.zeros(6)) == peaks(torch.zeros(0)) == peaks(torch.zeros(1)) == []


def test_top_peaks_never_select_more_than_their_share() -> None:
    assert peaks(torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0]), "top", 0.4) == [0, 2]
    assert peaks(torch.zeros(10), "top", 0.4) == [0, 1, 2, 3]
    assert len(peaks(torch.rand(11), "top", 0.4)) == 5  # ceil
    with pytest.raises(InputError, match="'local' or 'top'"):
        peaks(torch.zeros(3), "max")
    for share in (0.0, 1.1):
        with pytest.raises(InputError, match="top is in"):
            peaks(torch.zeros(3), "top", share)


def test_head_split_takes_both_ends() -> None:
    span = torch.arange(20.0).flip(0).view(2, 10)
    split = head_split(span, [3, 7])
    assert split.local == ((7, 9), (7, 8), (7, 7), (7, 6), (7, 5), (7, 4))
    assert set(split.far) == {(3, n) for n in range(6)}
    for share in (0.0, 0.6):
        with pytest.raises(InputError, match="quantile is in"):
            head_split(span, [3, 7], share)


@pytest.mark.parametrize(
    ("layers", "expected"), [(36, [12, 15, 18, 21, 24]), (6, [2, 3, 4]), (2, [0, 1]), (1, [0])]
)
def test_middle_layers(layers: int, expected: list[int]) -> None:
    assert middle_layers(layers) == expected


def made(
    entropy: list[float],
    preplan: list[int],
    anchor: list[int],
    receivers: list[int],
    counted: int | None = None,
) -> Rhythm:
    size = len(entropy)
    zeros = [0.0] * size
    return Rhythm(
        start=1,
        tokens=[5] * size,
        waad=zeros,
        fai=zeros,
        receiver=zeros,
        entropy=entropy,
        preplan=preplan,
        anchor=anchor,
        receiver_peaks=receivers,
        counted=size if counted is None else counted,
        layers=[0],
        span=[[1.0, 2.0]],
        local=[(0, 0)],
        far=[(0, 1)],
        receivers=[(0, 1)],
        sink_mass={"local": 0.0, "global": 0.0},
        window=10,
        horizon=(0, None),
        rule="by hand",
    )


def test_couplings_of_hand_made_marks() -> None:
    entropy = [0.0] * 20
    for place in (2, 8, 14):
        entropy[place] = 1.0
    one = made(entropy, [2, 8, 14], [3, 9, 14, 19], [3, 9, 18, 19])
    found = couplings([one, one], shuffles=4000, seed=1)
    assert found["entropy"].observed == 1.0
    assert found["entropy"].random == pytest.approx(3 / 20, abs=0.01)
    assert found["receiver"].observed == pytest.approx(3 / 4)
    assert found["receiver"].random == pytest.approx(4 / 20, abs=0.01)
    # anchors 3, 9 follow at once, 14 coincides, 19 stands alone; 6 of 20 places would do
    assert found["follow"].observed == pytest.approx(3 / 4)
    assert found["follow"].random == pytest.approx(6 / 20, abs=0.01)
    assert found["follow"].lift == pytest.approx(1.5, abs=0.06)
    assert found["entropy"].p < 0.01
    assert found["entropy"].marks == 6
    assert couplings([one], follow=0)["follow"].observed == pytest.approx(1 / 4)
    assert couplings([one], follow=5)["follow"].observed == 1.0


def test_marks_at_random_are_rarely_significant() -> None:
    """The test keeps its promise: about one in twenty of couplings that are none."""
    found = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        several = []
        for _ in range(12):
            places = [
                torch.randperm(60, generator=random)[:15].sort().values.tolist() for _ in range(3)
            ]
            several.append(made(torch.rand(60, generator=random).tolist(), *places))
        found += list(couplings(several, shuffles=300, seed=seed).values())
    assert sum(c.p < 0.05 for c in found) <= 8  # of 60
    assert all(c.low <= c.lift <= c.high for c in found)


def test_rotation_keeps_the_spacing() -> None:
    """Marks on every second place: thrown anywhere they look coupled, turned round they do not."""
    beat = list(range(0, 40, 4))
    one = made([0.0] * 40, beat, [n + 2 for n in beat], beat)
    assert couplings([one], shuffles=500, control="rotate")["follow"].observed == 0
    both = made([0.0] * 40, beat, beat, beat)
    turned = couplings([both], shuffles=2000, control="rotate")["receiver"]
    assert turned.random == pytest.approx(1 / 4, abs=0.03)
    assert turned.p == pytest.approx(1 / 4, abs=0.03)
    assert couplings([both], shuffles=2000)["receiver"].p < 0.001


def test_the_last_tokens_do_not_count() -> None:
    late = made([0.0] * 10 + [9.0] * 10, [5], [5], [5], counted=10)
    assert couplings([late])["entropy"].observed == 0.0
    assert couplings([late])["entropy"].random == 0.0


def test_couplings_refuse_what_cannot_be() -> None:
    with pytest.raises(InputError, match="no response has a mark"):
        couplings([made([0.0] * 9, [], [], [])])
    one = made([0.0] * 9, [1], [1], [1])
    with pytest.raises(InputError, match="shuffle"):
        couplings([one], control="swap")
    with pytest.raises(InputError, match="follow"):
        couplings([one], follow=-1)


def test_a_rhythm_survives_json() -> None:
    seen = rhythm(tiny("llama"), ids(), START)
    plain = json.loads(json.dumps(seen.as_dict()))
    assert "global" in plain and "far" not in plain
    assert Rhythm.from_dict(plain) == seen


def test_marks_follow_their_rule() -> None:
    seen = rhythm(tiny("llama"), ids(), START, tail=4)
    assert seen.anchor == peaks(torch.tensor(seen.fai[: seen.counted]))
    assert seen.preplan == peaks(torch.tensor(seen.waad[: seen.counted]))
    top = seen.with_rule("top", 0.2)
    assert len(top.anchor) == 5 and top.rule == "largest 20%"
    assert top == rhythm(tiny("llama"), ids(), START, tail=4, rule="top", top=0.2)


def test_left_padding_is_taken_out() -> None:
    model, tokens = tiny("gpt2"), ids()  # learned positions: a padded row would show
    padded = torch.cat([torch.zeros(7, dtype=torch.long), tokens])[None]
    mask = (torch.arange(TOTAL + 7) >= 7).long()[None]
    found = rhythm(model, padded, START + 7, attention_mask=mask)
    assert found == rhythm(model, tokens, START)
    assert found.start == START


def test_heads_may_be_calibrated() -> None:
    model = tiny("llama")
    several = [rhythm(model, ids(n), START) for n in range(3)]
    heads = calibrated(several)
    assert heads == head_split(torch.tensor([r.span for r in several]).mean(0), [0, 1])
    fixed = rhythm(model, ids(7), START, heads=heads)
    assert (tuple(fixed.local), tuple(fixed.far)) == (heads.local, heads.far)
    with pytest.raises(InputError, match="was not measured"):
        rhythm(model, ids(), START, heads=Heads(((9, 0),), ((0, 0),)))
    with pytest.raises(InputError, match="different layers"):
        calibrated([several[0], replace(several[1], layers=[1, 2])])


def test_window_layers_are_not_compared_with_full_ones() -> None:
    assert rhythm(tiny("gemma3"), ids(), START).layers == [2]
    assert rhythm(tiny("mistral"), ids(), START).layers == [0, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"response_start": 0}, "between 1"),
        ({"response_start": TOTAL}, "between 1"),
        ({"response_start": TOTAL - 1}, "less than two tokens"),
        ({"window": 0}, "window"),
        ({"horizon": (9, 3)}, "horizon"),
        ({"horizon": (-1, 3)}, "horizon"),
        ({"tail": -1}, "tail"),
        ({"layers": "last"}, '"all", "middle"'),
        ({"layers": [9]}, "out of range"),
        ({"layers": []}, "no layer"),
        ({"receivers": 99}, "receivers"),
        ({"quantile": 0.7}, "share of heads"),
        ({"input_ids": torch.zeros(2, 30, dtype=torch.long)}, "one row"),
        ({"attention_mask": torch.ones(3)}, "3 entries"),
        ({"attention_mask": torch.arange(TOTAL) >= START}, "all padding"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], said: str) -> None:
    asked = {"input_ids": ids(), "response_start": START, **change}
    with pytest.raises(InputError, match=said):
        rhythm(tiny("llama"), **asked)


@pytest.mark.parametrize(("family", "said"), [("bert", "looks ahead"), ("t5", "encoder")])
def test_models_that_are_not_causal_are_refused(family: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        rhythm(tiny(family), ids(), START)


def test_words() -> None:
    assert jaccard("ab", "bc") == pytest.approx(1 / 3)
    assert jaccard([], []) == 1.0 and jaccard(["a"], []) == 0.0
    assert content_words("The 12 Apples, and the apples!") == {"12", "apples"}
    assert kurtosis(torch.tensor([0.0] * 9 + [1.0])) > kurtosis(torch.arange(10.0))


class Numbers:
    """A tokenizer whose words are the ids."""

    pad_token_id = 0
    eos_token_id = 2

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(str(n) for n in row if n > 2) for row in rows.tolist()]


def test_perturb_compares_greedy_continuations() -> None:
    model, tokens, place = tiny("llama"), ids(), 20
    share = perturb(model, Numbers(), tokens, place, alternatives=2, new_tokens=6)

    def tail(token: int) -> set[str]:
        row = torch.cat([tokens[:place], torch.tensor([token])])[None]
        with torch.no_grad():
            made = model.generate(row, do_sample=False, max_new_tokens=6, pad_token_id=0)
        return {str(n) for n in made[0, place + 1 :].tolist() if n > 2}

    with torch.no_grad():
        order = model(tokens[None, :place]).logits[0, -1].argsort(descending=True).tolist()
    own = int(tokens[place])
    others = [n for n in order if n != own][:2]
    expected = sum(jaccard(tail(own), tail(n)) for n in others) / 2
    assert share == pytest.approx(expected)
    with pytest.raises(InputError, match="out of range"):
        perturb(model, Numbers(), tokens, 0)
    with pytest.raises(InputError, match="at least 1"):
        perturb(model, Numbers(), tokens, 5, alternatives=0)
