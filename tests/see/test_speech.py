"""Cross attention of speech models: the facts equal the explicit maps, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from regard import zoo
from regard.errors import InputError, RegardError
from regard.parts.speech import cross_attention as speech
from regard.parts.speech import words as speech_words
from regard.parts.speech.cross_attention import CrossRows, cross_attention
from regard.reach import Session
from regard.zoo.tiny import inputs, tiny

PROMPT = [1, 5]
TEXT = [9, 4, 77, 30, 12, 8, 99]


def speech2text(seed: int = 0) -> Any:
    """A tiny Speech2Text: time first, an encoder that shortens by four, padding in its input."""
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, input_feat_per_channel=8,
        conv_channels=16, max_source_positions=64, max_target_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Speech2TextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_positions" not in name:
                weight.normal_(0.0, weight.shape[-1] ** -0.5 * (2 if "q_proj" in name else 1))
    return model


def seamless(seed: int = 0) -> Any:
    """A tiny SeamlessM4T: a conformer that shortens by three in front of a text decoder."""
    from transformers import SeamlessM4TConfig, SeamlessM4TForSpeechToText

    config = SeamlessM4TConfig(
        vocab_size=128, hidden_size=32, decoder_layers=3, decoder_attention_heads=4,
        decoder_ffn_dim=48, speech_encoder_layers=1, speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=48, feature_projection_input_dim=8, adaptor_kernel_size=3,
        adaptor_stride=3, conv_depthwise_kernel_size=3, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    return SeamlessM4TForSpeechToText(config).eval()


def case(family: str) -> tuple[Any, dict[str, Any]]:
    if family == "whisper":
        model = tiny("whisper")
        return model, {"input_features": inputs("whisper", model, batch=1)["input_features"]}
    random = torch.Generator().manual_seed(3)
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[0, 30:] = 0
    given = {"input_features": torch.randn(1, 41, 8, generator=random), "attention_mask": mask}
    return {"speech2text": speech2text, "seamless": seamless}[family](), given


def explicit(model: Any, given: dict[str, Any], ids: list[int]) -> list[torch.Tensor]:
    """The cross-attention matrices of every layer, `[heads, positions, frames]`, as eager gives."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        made = model(**given, decoder_input_ids=torch.tensor([ids]), output_attentions=True)
    model.set_attn_implementation(own)
    return [a[0].double() for a in made.cross_attentions]


@pytest.mark.parametrize("family", ["whisper", "speech2text", "seamless"])
@pytest.mark.parametrize("block", [64, 3])
def test_facts_equal_the_explicit_maps(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "BLOCK", block)
    model, given = case(family)
    seen = cross_attention(model, None, given, TEXT, prompt=PROMPT, maps=True, frames=9)
    rows = slice(len(PROMPT) - 1, len(PROMPT) - 1 + len(TEXT))  # the steps that predict TEXT
    whole = [a[:, rows] for a in explicit(model, given, PROMPT + TEXT)]
    assert seen.all_frames == whole[0].shape[-1] and seen.frames == 9
    assert seen.maps is not None and list(seen.layers) == list(range(len(whole)))
    for layer, a in enumerate(whole):
        real = a[..., :9]
        assert (seen.maps[layer] - real).abs().max() < 1e-5
        assert (seen.layers[layer] - real.mean(0)).abs().max() < 1e-5
        entropy = -torch.special.xlogy(a, a).sum(-1)
        assert (seen.entropy[layer] - entropy).abs().max() < 1e-5
        assert (seen.dropped[layer] - a[..., 9:].sum(-1)).abs().max() < 1e-5
        places = torch.arange(9, dtype=torch.float64)
        assert (seen.centre[layer] - real @ places / real.sum(-1)).abs().max() < 1e-4
        assert (seen.received[layer] - real.sum(1)).abs().max() < 1e-5
    assert (seen.mean - torch.stack([a[..., :9].mean(0) for a in whole]).mean(0)).abs().max() < 1e-5


def test_rows_are_those_that_predict_a_token_not_those_that_read_it() -> None:
    """Changing the last token cannot change any row: no row of the transcript has it as input."""
    model, given = case("whisper")
    one = cross_attention(model, None, given, [9, 4, 77], prompt=PROMPT)
    other = cross_attention(model, None, given, [9, 4, 13], prompt=PROMPT)
    assert torch.equal(one.mean, other.mean)
    changed = cross_attention(model, None, given, [9, 13, 77], prompt=PROMPT)
    assert torch.equal(one.mean[:2], changed.mean[:2])
    assert not torch.allclose(one.mean[2], changed.mean[2])


def test_the_alignment_rows_reach_one_step_further() -> None:
    model, given = case("whisper")
    model.generation_config.alignment_heads = [[1, 2], [0, 3]]
    seen = cross_attention(model, None, given, TEXT, prompt=PROMPT)
    whole = explicit(model, given, PROMPT + TEXT)
    want = torch.stack([whole[1][2], whole[0][3]])[:, len(PROMPT) - 1 :]
    assert seen.alignment_heads == [(1, 2), (0, 3)]
    assert seen.aligned.shape == want.shape == (2, len(TEXT) + 1, 16)
    assert (seen.aligned - want).abs().max() < 1e-5
    assert seen.maps is None


@pytest.mark.parametrize("family", ["whisper", "speech2text", "seamless"])
@pytest.mark.parametrize("new", [1, 7])
def test_under_generate_the_rows_are_those_of_forced_decoding(family: str, new: int) -> None:
    model, given = case(family)
    settings = {"max_new_tokens": new, "do_sample": False}
    live = cross_attention(model, None, given, live=True, maps=True, **settings)
    after = cross_attention(model, None, given, maps=True, **settings)
    forced = cross_attention(model, None, given, live.tokens, prompt=live.prompt, maps=True)
    assert live.tokens == after.tokens == forced.tokens and live.prompt == after.prompt
    for other in (after, forced):
        assert other.maps is not None and live.maps is not None
        for layer, rows in live.maps.items():
            assert (rows - other.maps[layer]).abs().max() < 1e-5
        for name in ("entropy", "dropped", "received", "mean"):
            assert (getattr(live, name) - getattr(other, name)).abs().max() < 1e-4


def test_what_is_kept_does_not_grow_with_the_heads() -> None:
    """Under generate the handler keeps one mean row a layer and token, not one a head."""
    model, given = case("whisper")
    model.generation_config.alignment_heads = [[1, 2]]
    few = cross_attention(model, None, given, TEXT[:2], prompt=PROMPT)
    many = cross_attention(model, None, given, TEXT, prompt=PROMPT)
    layers, heads, frames = 2, 4, 16
    a_token = (many.kept_bytes - few.kept_bytes) / (len(TEXT) - 2)
    # one mean row a layer, one of the alignment head, three numbers a head
    assert a_token == 4 * (layers * frames + frames + 3 * layers * heads)
    every = cross_attention(model, None, given, TEXT, prompt=PROMPT, maps=True)
    assert every.kept_bytes - many.kept_bytes == 4 * layers * heads * frames * len(TEXT)
    facts = [
        cross_attention(model, None, given, text, prompt=PROMPT, rows=False)
        for text in (TEXT[:2], TEXT)
    ]
    grown = facts[1].kept_bytes - facts[0].kept_bytes
    assert grown == 4 * 3 * layers * heads * (len(TEXT) - 2)  # whatever the number of frames
    for name in ("entropy", "dropped", "centre", "received"):
        assert torch.equal(getattr(facts[1], name), getattr(many, name))
    with pytest.raises(InputError, match="rows=True"):
        _ = facts[1].mean


def test_leaves_no_trace() -> None:
    model, given = case("whisper")
    ids = torch.tensor([PROMPT + TEXT])
    with torch.no_grad():
        before = model(**given, decoder_input_ids=ids).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    cross_attention(model, None, given, max_new_tokens=3)
    cross_attention(model, None, given, live=True, max_new_tokens=3)
    cross_attention(model, None, given, TEXT, prompt=PROMPT)
    with pytest.raises(InputError):
        cross_attention(model, None, given, [500], prompt=PROMPT)
    with torch.no_grad():
        assert torch.equal(model(**given, decoder_input_ids=ids).logits, before)
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == after and model.config._attn_implementation == "sdpa"


def test_a_decoder_that_starts_again_forgets_the_first_run() -> None:
    """As Whisper's language detection and its second tries do before the run that counts."""
    model, given = case("whisper")
    rows = CrossRows()
    with torch.no_grad(), Session(model, [rows]):
        model(**given, decoder_input_ids=torch.tensor([[1]]))
        model(**given, decoder_input_ids=torch.tensor([PROMPT]))
    found = rows.result(1)
    want = [a[:, 1] for a in explicit(model, given, PROMPT)]
    assert (found["layers"][0] - want[0].mean(0)).abs().max() < 1e-5
    assert (found["received"][1] - want[1]).abs().max() < 1e-5


def test_what_cannot_be_done_is_refused() -> None:
    model, given = case("whisper")
    words = {"prompt": PROMPT}
    with pytest.raises(InputError, match="no cross attention"):
        cross_attention(tiny("llama"), None, given, TEXT)
    with pytest.raises(InputError, match="reads text"):
        cross_attention(tiny("t5"), None, given, TEXT)
    with pytest.raises(InputError, match="empty"):
        cross_attention(model, None, given, [], **words)
    with pytest.raises(InputError, match="no token 500"):
        cross_attention(model, None, given, [9, 500], **words)
    with pytest.raises(InputError, match="room for"):
        cross_attention(model, None, given, [9] * 63, **words)
    with pytest.raises(InputError, match="without a feature extractor"):
        cross_attention(model, None, np.zeros(100))
    with pytest.raises(RegardError, match="one clip at a time"), torch.no_grad():
        pair = {"input_features": given["input_features"].repeat(2, 1, 1)}
        with Session(model, [CrossRows()]):
            model(**pair, decoder_input_ids=torch.tensor([PROMPT, PROMPT]))


def test_the_fit_is_the_mean_log_probability_of_a_given_transcript() -> None:
    model, given = case("whisper")
    with torch.no_grad():
        logits = model(**given, decoder_input_ids=torch.tensor([PROMPT + TEXT])).logits[0]
    logs = logits[len(PROMPT) - 1 : -1].double().log_softmax(-1)
    want = logs[torch.arange(len(TEXT)), TEXT].mean()
    seen = cross_attention(model, None, given, TEXT, prompt=PROMPT)
    assert seen.fit == pytest.approx(float(want), abs=1e-4)
    assert cross_attention(model, None, given, max_new_tokens=2).fit is None


# Words and times


def slow_warp(cost: np.ndarray) -> float:
    """The cost of the cheapest path, cell by cell."""
    rows, columns = cost.shape
    best = np.full((rows, columns), np.inf)
    for i in range(rows):
        for j in range(columns):
            before = [
                best[a, b] for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(a, b) >= 0
            ]
            best[i, j] = cost[i, j] + (min(before) if before else 0.0)
    return float(best[-1, -1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (4, 9), (9, 4), (13, 40)])
def test_warping_finds_the_cheapest_path(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(5).standard_normal(shape)
    rows, columns = speech_words.warp(cost)
    steps = np.stack([np.diff(rows), np.diff(columns)], 1)
    assert rows[0] == columns[0] == 0 and (rows[-1], columns[-1]) == (shape[0] - 1, shape[1] - 1)
    assert ((steps >= 0) & (steps <= 1)).all() and (steps.sum(1) > 0).all()
    assert cost[rows, columns].sum() == pytest.approx(slow_warp(cost))


def test_a_staircase_of_attention_gives_its_steps() -> None:
    true = [0, 7, 12, 30, 41]
    rows = torch.full((3, len(true), 50), 1e-3)
    for i, start in enumerate(true):
        rows[:, i, start : [*true, 50][i + 1]] = 1.0
    rows = rows / rows.sum(-1, keepdim=True)
    assert speech_words.starts(rows, width=1).tolist() == true
    assert np.abs(speech_words.starts(rows, width=7) - np.array(true)).max() <= 1


def test_constant_attention_has_times_and_no_nan() -> None:
    found = speech_words.starts(torch.full((2, 4, 10), 0.1))
    assert len(found) == 4 and (np.diff(found) >= 0).all()
    assert speech_words.spearman(torch.ones(3, 5)).tolist() == [0.0] * 3


def test_median_filter_is_the_median() -> None:
    x = torch.randn(2, 3, 20)
    got = speech_words.median(x, 5)
    padded = torch.nn.functional.pad(x, (2, 2), mode="reflect")
    for t in range(20):
        assert torch.equal(got[..., t], padded[..., t : t + 5].median(-1).values)
    assert torch.equal(speech_words.median(x[..., :2], 5), x[..., :2])  # too short to filter
    with pytest.raises(InputError, match="odd"):
        speech_words.median(x, 4)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([" Hello", ",", " wor", "ld", "."], ["Hello,", "world."]),
        (["It", "'s", " fine"], ["It's", "fine"]),
        ([" (", "so", ")", " then"], ["(so)", "then"]),
        (["私", "は", "行く", "。"], ["私", "は", "行く。"]),
        ([" caf", "", "é"], ["café"]),
        ([], []),
    ],
)
def test_words_are_made_of_pieces(texts: list[str], words: list[str]) -> None:
    found = speech_words.group(texts)
    assert [w for w, _, _ in found] == words
    places = [n for _, a, b in found for n in range(a, b)]
    assert places == list(range(len(texts)))


def test_word_error_rate_counts_edits() -> None:
    assert speech_words.word_errors("one two three", "one three") == (1, 3)
    assert speech_words.word_errors("one two", "one and two") == (1, 2)
    assert speech_words.word_errors("It's 5.", "it's five") == (1, 2)
    assert speech_words.word_errors("a b c", "") == (3, 3)


# The real models


@pytest.fixture(scope="module", params=["whisper-tiny.en", "whisper-base"])
def real(request: pytest.FixtureRequest) -> Any:
    try:
        return zoo.load(request.param)
    except InputError as problem:
        pytest.skip(str(problem))


@pytest.mark.slow
def test_real_facts_equal_the_explicit_maps(real: Any) -> None:
    model, processor = real
    clip = zoo.clip("minutes")
    seen = cross_attention(model, processor, clip, maps=True)
    given, _ = speech.prepare(model, processor, clip)
    del given["attention_mask"]
    whole = explicit(model, given, seen.prompt + seen.tokens)
    rows = slice(len(seen.prompt) - 1, -1)
    assert seen.maps is not None and seen.frames == math.ceil(clip.seconds / 0.02)
    for layer, a in enumerate(whole):
        assert (seen.maps[layer] - a[:, rows, : seen.frames]).abs().max() < 1e-5
        assert (seen.dropped[layer] - a[:, rows, seen.frames :].sum(-1)).abs().max() < 1e-5
    live = cross_attention(model, processor, clip, live=True)
    assert live.tokens == seen.tokens and (live.mean - seen.mean).abs().max() < 1e-5


@pytest.mark.slow
def test_real_word_times_lie_near_the_true_ones(real: Any) -> None:
    """And nearer than transformers' own stamps, which come from the rows one step later."""
    model, processor = real
    ours, theirs = [], []
    for name in zoo.clips():
        clip = zoo.clip(name)
        seen = cross_attention(model, processor, clip)
        if len(seen.words) != len(clip.spoken["words"]):
            continue
        given, _ = speech.prepare(model, processor, clip)
        made = model.generate(**given, return_token_timestamps=True, return_dict_in_generate=True)
        assert made["sequences"][0, len(seen.prompt) :][: len(seen.tokens)].tolist() == seen.tokens
        stamps = made["token_timestamps"][0, len(seen.prompt) :].tolist()
        for word, (start, _) in zip(seen.words, clip.spoken["times"], strict=True):
            ours.append(abs(word.start - start))
            theirs.append(abs(stamps[word.first] - start))
    assert len(ours) > 10
    assert np.mean(ours) < 0.2 < np.mean(theirs)
