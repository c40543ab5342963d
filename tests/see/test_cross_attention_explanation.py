"""Attention beside saliency: closed forms, dense references, and a tiny model from end to end."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch

from regard.errors import InputError
from regard.see.cross_attention_explanation.deletion import (
    area,
    decoded_errors,
    deletion,
    forced_errors,
    order,
    sentence_map,
    word_errors,
    words_of,
)
from regard.see.cross_attention_explanation.forced import Clip, Forced
from regard.see.cross_attention_explanation.maps import (
    compare,
    cross_attention,
    groups,
    in_span,
    pearson,
    place_words,
    pool,
    ranks,
    spearman,
    split_half,
    standardised,
)
from regard.see.cross_attention_explanation.method import explain_clip
from regard.see.cross_attention_explanation.overview import overview, references
from regard.zoo import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*cells were out fewer.*")


class Letters:
    """A tokenizer whose every id is a word of its own."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(f" w{int(n)}" for n in ids if int(n) > 2)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        words = [int(w[1:]) for w in text.split()]
        return [1, *words, 2] if add_special_tokens else words


def clip(frames: int = 23, margin: int | None = None) -> Clip:
    random = torch.Generator().manual_seed(0)
    return Clip(tiny("whisper"), torch.randn(8, 32, generator=random), frames, margin=margin)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- attention -----------------------------------------------------------------------------------
@pytest.mark.parametrize("margin", [None, 4])
def test_cross_attention_is_the_models_own(margin: int | None) -> None:
    forced = Forced(clip(margin=margin), [7, 50, 9])
    found, dropped = cross_attention(forced)
    model = forced.clip.model
    model.set_attn_implementation("eager")
    from transformers.modeling_outputs import BaseModelOutput

    whole = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=forced.clip.states[None].clone()),
        decoder_input_ids=torch.tensor([[1, 7, 50]]),
        output_attentions=True,
    ).cross_attentions
    want = torch.stack([x[0] for x in whole])
    assert found.shape == (2, 4, 3, 12)
    torch.testing.assert_close(found, want[..., :12].detach(), atol=1e-5, rtol=0)
    assert dropped == pytest.approx(float(want[..., 12:].sum(-1).mean()), abs=1e-5)


def test_groups_are_means() -> None:
    x = maps(3, 4, 2, 5)
    made = groups(x)
    assert made["heads"] is x and made["layers"].shape == (3, 2, 5)
    torch.testing.assert_close(made["places"], x.mean(0))
    torch.testing.assert_close(made["last"], x[2].mean(0))
    torch.testing.assert_close(made["all"], made["layers"].mean(0))


def test_a_model_without_cross_attention_is_refused() -> None:
    from regard.reach import Session
    from regard.see.cross_attention_explanation.maps import _Cross

    with pytest.raises(InputError, match="no cross attention"):
        Session(tiny("llama"), [_Cross(slice(0, 1))])


# -- closed forms --------------------------------------------------------------------------------
@pytest.mark.parametrize(("frames", "stride"), [(8, 2), (9, 2), (11, 4), (3, 3)])
def test_pooling_is_a_loop(frames: int, stride: int) -> None:
    x = torch.randn(3, 5, frames)
    steps = -(-frames // stride)
    want = [
        [float(x[i, :, j * stride : (j + 1) * stride].max()) for j in range(steps)]
        for i in range(3)
    ]
    torch.testing.assert_close(pool(x, stride, steps), torch.tensor(want))


def test_pearson_is_the_mean_of_the_rows_and_numpys() -> None:
    a, b = maps(4, 9), maps(4, 9, seed=1)
    rows = [numpy.corrcoef(x, y)[0, 1] for x, y in zip(a.double().numpy(), b.double().numpy())]
    assert float(pearson(a, b)) == pytest.approx(float(numpy.mean(rows)), abs=1e-12)
    many = pearson(torch.stack([a, b]), b)
    assert many.shape == (2,) and float(many[1]) == pytest.approx(1)


def test_constant_rows_are_counted_and_become_zeros() -> None:
    a, b = maps(4, 9), maps(4, 9, seed=1)
    a[2] = 0.1
    found, flat = standardised(a)
    assert flat.tolist() == [False, False, True, False] and not bool(found[2].any())
    made = compare(a[None, None], b)
    assert made["constant_rows"] == {"attention": 1, "saliency": 0}
    assert made["pearson"]["all"] == pytest.approx(float(pearson(a, b)))
    assert compare(torch.ones(1, 1, 4, 9), b)["pearson"]["heads"] == [[None]]


def test_ranks_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [1.0, 1.0, 0.0, 5.0, 2.0]])
    want = torch.tensor([stats.rankdata(r) - 1 for r in x.numpy()])
    torch.testing.assert_close(ranks(x), want.double())
    a, b = maps(1, 20), maps(1, 20, seed=1)
    assert float(spearman(a, b)) == pytest.approx(stats.spearmanr(a[0], b[0])[0], abs=1e-9)


def test_reliability_bounds_what_noise_leaves_of_a_correlation() -> None:
    """Halves of a known signal-to-noise ratio: r is signal over signal plus noise."""
    random = torch.Generator().manual_seed(0)
    signal = torch.randn(200, 50, generator=random)
    halves = signal + torch.randn(2, 200, 50, generator=random)
    r, whole = split_half(halves)
    assert r == pytest.approx(0.5, abs=0.03) and whole == pytest.approx(2 / 3, abs=0.03)
    mean = halves.mean(0)
    assert float(pearson(mean, signal)) == pytest.approx(whole**0.5, abs=0.02)
    opposite = torch.stack([signal, -signal])
    assert split_half(opposite)[1] == -1.0


def test_spans() -> None:
    x = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 2.0, 2.0, 6.0]])
    found = in_span(x, [(1, 3), (0, 1)])
    assert found == {"mass": 0.5, "hit": 0.5, "chance": 0.375}
    assert in_span(torch.ones(1, 4), [(0, 2)])["mass"] == 0.0


def test_words_are_placed() -> None:
    words = [("Don't", 0.0, 0.2), ("stop", 0.2, 0.4)]
    assert place_words([" Don", "'t", " st", "op", "."], words, 0.1, 4) == [
        *((0, 2), (0, 2), (2, 4), (2, 4), None),
    ]
    assert place_words([" Do", " stop"], words, 0.1, 4) is None


# -- deletion ------------------------------------------------------------------------------------
def test_word_errors_and_area() -> None:
    assert words_of("It's 3 o'clock -- NOW!") == ["it's", "3", "o'clock", "now"]
    assert word_errors(["a", "b"], []) == 100 and word_errors(["a"], ["a", "b", "c"]) == 200
    for right, said in itertools.product(itertools.product("ab", repeat=3), repeat=2):
        assert word_errors(right, said) <= 100 * sum(x != y for x, y in zip(right, said)) / 3 + 1e-9
    assert area([0, 100], [0, 100]) == 50 and area([0, 100], [300, 300]) == 100
    with pytest.raises(InputError, match="right word"):
        word_errors([], ["a"])


def test_order_and_sentence_map() -> None:
    x = torch.tensor([[1.0, 5.0, 1.0], [1.0, 5.0, 2.0]])
    assert order(x).tolist() == [1, 4, 5, 0, 3, 2]  # whole frames first to last among equals
    one = sentence_map(torch.tensor([[1.0, 3.0, 2.0], [10.0, 10.0, 30.0]]))
    assert one.tolist() == [0.0, 0.5, 0.75]


def test_deletion_takes_out_the_highest_first() -> None:
    given = clip()
    bins, frames = given.field.shape
    right = torch.zeros(1, bins, frames)
    right[0, :, 5] = 1.0
    seen: list[torch.Tensor] = []

    def errors(fields: torch.Tensor) -> list[float]:
        seen.append(fields != given.field)
        return [100.0 * bool(x[:, 5].all()) for x in seen[-1]]

    made = deletion(given, {"good": right, "bad": -right}, errors, step=10, progress=False)
    assert made.percent == [10.0 * n for n in range(11)]
    assert made.errors["good"] == [0.0] + [100.0] * 10
    assert made.errors["bad"] == [0.0] * 10 + [100.0]
    assert made.scores["good"] == 95 and made.scores["bad"] == 5
    assert set(made.scores) == {"good", "bad", "random steps", "random cells"}
    sizes = torch.cat(seen).flatten(1).sum(1)
    assert int(sizes.min()) == 0 and int(sizes.max()) == bins * frames
    assert made.sizes["good"] == pytest.approx(1 / frames)
    with pytest.raises(InputError, match="divides 100"):
        deletion(given, {"good": right}, errors, step=7, progress=False)


def test_errors_of_a_real_decoder() -> None:
    given = clip()
    said = given.transcribe(limit=6)[0]
    forced, read = Forced(given, said), Letters().decode
    free = decoded_errors(given, lambda row: words_of(read(row)), words_of(read(said)), 6)
    assert free(given.field[None]) == [0.0]
    assert forced_errors(forced)(given.field[None]) == [0.0]
    noise = torch.randn(2, *given.field.shape)
    assert max(free(noise)) <= 100 and max(forced_errors(forced)(noise)) > 0
    with pytest.raises(InputError, match="right word"):
        decoded_errors(given, lambda row: [], [], 6)


# -- from end to end -----------------------------------------------------------------------------
def made(margin: int | None = None, **how: Any) -> Any:
    settings: dict[str, Any] = {"masks": 24, "segments": (200, 400), "step": 25, "progress": False}
    return explain_clip(clip(margin=margin), Letters(), **{**settings, **how})


def test_it_runs_from_end_to_end_and_leaves_no_trace() -> None:
    import json

    found = made(transcript="w7 w50 w9")
    assert found.transcript == "w7 w50 w9" and found.cross.shape == (2, 4, 3, 12)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["stride"] == 2 and plain["steps"] == 12 and plain["agreement"] is None
    assert plain["bound"] == pytest.approx(max(0.0, plain["reliability"]["pooled"][1]) ** 0.5)
    x, h = plain["input"]["pearson"]["all"], plain["states"]["pearson"]["all"]
    assert plain["mixing"]["gap"] == pytest.approx(h - x)
    assert plain["mixing"]["relative"] == pytest.approx((h - x) / h)
    assert plain["deletion"]["counted"] == "words"
    assert any("left alone" in n for n in plain["notes"])
    again = made(transcript="w7 w50 w9")
    assert again.as_dict() == found.as_dict()
    model = found.forced.clip.model
    ids = torch.tensor([[1, 7, 50]])
    fresh = tiny("whisper")
    whole = found.forced.clip.whole[None]
    assert torch.equal(
        model(input_features=whole, decoder_input_ids=ids).logits,
        fresh(input_features=whole, decoder_input_ids=ids).logits,
    )


def test_a_cut_window_says_what_it_costs() -> None:
    found = made(margin=4, transcript="w7 w50 w9")
    assert set(found.agreement) == {"same", "divergence", "attention"}
    assert found.agreement["divergence"] > 0
    assert any("another model" in n for n in found.notes)
    assert found.deletion.counted == "pieces"
    same = made(margin=32, transcript="w7 w50 w9")
    assert same.agreement["same"] == 1
    assert same.agreement["divergence"] == pytest.approx(0, abs=1e-6)


def test_word_times_are_used_where_the_words_fit() -> None:
    words = [("w7", 0.0, 0.08), ("w50", 0.08, 0.16), ("w9", 0.16, 0.24)]
    found = made(transcript="w7 w50 w9", words=words, step=None)
    assert set(found.spans) == {"attention", "input", "states"} and found.deletion is None
    assert found.spans["input"]["chance"] == pytest.approx(1 / 3)
    other = made(transcript="w7 w50 w9", words=words[:2], step=None)
    assert other.spans == {} and any("differs from the known words" in n for n in other.notes)


def test_one_piece_is_allowed_and_said() -> None:
    found = made(transcript="w7", step=None)
    assert any("one piece" in n for n in found.notes)


def test_the_overview_is_plain_and_the_page_holds_it() -> None:
    pytest.importorskip("plotly")
    import json

    from regard.report.explain import badge, render_page

    found = made(transcript="w7 w50 w9")
    captum = pytest.importorskip("captum")
    assert captum
    cross_check = references(found, ("gradient_x_input",), progress=False)
    assert -1 <= cross_check["gradient_x_input"]["attention"] <= 1
    view = json.loads(json.dumps(overview(found, references=cross_check, meta={"model": "<b>"})))
    assert set(view["cells"]) == {"the whole transcript", "1. w7", "2. w50", "3. w9"}
    assert all(max(map(max, rows)) == 1 for rows in view["maps"].values())
    page = render_page(view)
    assert page == render_page(view) and "<b>" not in page.split("<main")[0].split("<h1>")[1]
    for words in ("Cross-attention and saliency maps", "Deletion test", badge(view)[0]):
        assert words in page
    bare = render_page({**view, "deletion": None, "cells": None, "maps": None})
    assert "Taking out" not in bare


def test_a_saliency_that_tells_nothing_has_no_reliability() -> None:
    halves = torch.stack([torch.zeros(2, 5), torch.rand(2, 5)])
    assert split_half(halves) == (0.0, 0.0)


def test_a_step_that_leads_nowhere_is_refused_before_any_mask_is_drawn() -> None:
    with pytest.raises(InputError, match="divides 100"):
        made(step=7, masks=3, antithetic=True)  # the masks would be refused too, later


def test_only_the_words_of_a_given_transcript_are_explained() -> None:
    found = made(transcript="  w9   w4 ", step=None)
    assert found.forced.text == [9, 4] and found.pieces == [" w9", " w4"]
