"""SPES finds what matters where that is known, and is the same however it is cut up."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import InputError
from regard.see.cross_attention_explanation.forced import Clip, Forced, features, prompt, shortened
from regard.see.cross_attention_explanation.saliency import (
    divergence,
    gradients,
    saliency,
    segment_counts,
    superpixels,
)
from regard.zoo import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*cells were out fewer.*")
FRAMES = 23  # of 32, and odd


def clip(margin: int | None = None, frames: int = FRAMES, seed: int = 0) -> Clip:
    random = torch.Generator().manual_seed(seed)
    return Clip(tiny("whisper"), torch.randn(8, 32, generator=random), frames, margin=margin)


def forced(**more: Any) -> Forced:
    return Forced(clip(**more), [7, 50, 9])


class Additive:
    """Stands in for a model: piece i changes by a known amount when known cells are out."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        field = torch.randn(6, 20, generator=random)
        model = SimpleNamespace(named_parameters=lambda: [])
        self.clip = SimpleNamespace(
            field=field, whole=field, frames=20, prompt=[1], model=model, steps=10, stride=2
        )
        self.text = [3, 4]
        self.important = torch.zeros(2, 6, 20, dtype=torch.bool)
        self.important[0, :, 4:6] = True
        self.important[1, :3, 14:16] = True
        self.plain = torch.tensor([[0.5, 0.5]] * 2).log()
        self.states = torch.zeros(0)

    def of_input(self, fields: Tensor) -> Tensor:
        """The more of the important cells are out, the further from even the two outcomes."""
        gone = (fields != self.clip.field)[:, None] & self.important[None]
        share = gone.flatten(2).sum(2) / self.important.flatten(1).sum(1)
        odds = 0.5 - 0.45 * share
        return torch.stack([odds, 1 - odds], -1).log()


def test_it_finds_the_cells_that_matter() -> None:
    toy: Any = Additive()
    for antithetic in (False, True):
        found = saliency(
            toy, masks=600, segments=(600, 1000), antithetic=antithetic, progress=False
        )
        assert found.map.shape == (2, 6, 20) and int(found.out.min()) > 100
        for n in (0, 1):
            inside = found.map[n][toy.important[n]]
            outside = found.map[n][~toy.important[n]]
            assert inside.mean() > outside.mean() + 3 * outside.std()


def test_sums_by_segment_equal_a_loop_over_cells() -> None:
    """The map is mean score over the masks in which a cell is out: checked against the paper's
    formula, written with a mask of cells, in float64.
    """
    toy: Any = Additive()
    seen: list[Tensor] = []
    plain = toy.of_input
    toy.of_input = lambda fields: seen.append(fields.clone()) or plain(fields)
    made = saliency(toy, masks=37, batch=5, segments=(300, 700), progress=False, p=0.3)
    num, den = torch.zeros(2, 6, 20).double(), torch.zeros(6, 20).double()
    for field in torch.cat(seen):
        out = (field != toy.clip.field).double()
        p, q = toy.plain.double(), plain(field[None])[0].double()
        score = (p.exp() * (p - q)).sum(-1)
        num += score[:, None, None] * out
        den += out
    want = torch.where(den > 0, num / den.clamp_min(1), 0.0)
    assert den.sum() > 0 and torch.equal(made.out.double(), den)
    torch.testing.assert_close(made.map.double(), want, rtol=1e-5, atol=1e-7)


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    file = tmp_path / "work.safetensors"
    how: dict[str, Any] = {"masks": 24, "batch": 4, "segments": (100, 200), "progress": False}
    whole = saliency(forced(), **how)

    class Stop(Exception):
        pass

    broken = forced()
    count, real = [0], broken.of_input

    def fails(fields: Tensor) -> Tensor:
        count[0] += 1
        if count[0] == 4:
            raise Stop
        return real(fields)

    broken.of_input = fails  # type: ignore[method-assign]
    with pytest.raises(Stop):
        saliency(broken, state=file, save_every=4, **how)
    counted, again = [0], forced()
    real_again = again.of_input

    def counts(fields: Tensor) -> Tensor:
        counted[0] += 1
        return real_again(fields)

    again.of_input = counts  # type: ignore[method-assign]
    resumed = saliency(again, state=file, save_every=4, **how)
    assert counted[0] == 3, "three of six batches were done before"
    for name in ("map", "halves", "out", "scores"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert [p.name for p in tmp_path.iterdir()] == ["work.safetensors"]


def test_work_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "work.safetensors"
    how: dict[str, Any] = {"batch": 4, "segments": (100,), "progress": False, "state": file}
    saliency(forced(), masks=8, **how)
    with pytest.raises(InputError, match="another run"):
        saliency(forced(), masks=12, **how)
    with pytest.raises(InputError, match="another run"):
        saliency(forced(seed=5), masks=8, **how)
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a saved"):
        saliency(forced(), masks=8, **how)


@pytest.mark.parametrize("on", ["input", "states"])
def test_the_batch_makes_no_difference(on: str) -> None:
    how: dict[str, Any] = {"on": on, "masks": 13, "segments": (100, 200), "progress": False}
    a, b = saliency(forced(), batch=1, **how), saliency(forced(), batch=6, **how)
    torch.testing.assert_close(a.map, b.map, rtol=1e-3, atol=1e-5)
    assert torch.equal(a.out, b.out)
    c = saliency(forced(), batch=6, seed=1, **how)
    assert not torch.equal(b.map, c.map)


def test_padding_is_never_touched_and_the_model_is_as_before() -> None:
    given = forced()
    before = {n: w.clone() for n, w in given.clip.model.state_dict().items()}
    state = torch.random.get_rng_state()
    seen: list[Tensor] = []
    real = given.clip.encoder.forward
    given.clip.encoder.forward = lambda x, *a, **k: seen.append(x.clone()) or real(x, *a, **k)
    try:
        saliency(given, masks=6, segments=(100,), progress=False)
    finally:
        del given.clip.encoder.forward
    assert seen and all(
        torch.equal(x[:, :, FRAMES:], given.clip.whole[None, :, FRAMES:].expand(len(x), -1, -1))
        for x in seen
    )
    assert any(not torch.equal(x[0, :, :FRAMES], given.clip.field) for x in seen)
    after = given.clip.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(state, torch.random.get_rng_state())


def test_saliency_of_the_encoding_runs_the_encoder_once() -> None:
    given = forced()
    given.clip.encoder.forward = None  # would fail if it ran again
    found = saliency(given, on="states", masks=20, progress=False)
    del given.clip.encoder.forward
    assert found.map.shape == (3, 1, 12)  # 23 frames, two to a step
    wide = saliency(forced(), on="states", masks=20, width=4, progress=False)
    assert wide.map.shape == (3, 1, 12)
    few = {"masks": 20, "segments": (500,), "progress": False}
    slic = saliency(forced(), on="states", geometry="slic", **few)
    assert slic.map.shape == (3, 64, 12)


def test_pairs_are_complements() -> None:
    toy: Any = Additive()
    seen: list[Tensor] = []
    real = toy.of_input
    toy.of_input = lambda fields: seen.append(fields.clone()) or real(fields)
    made = saliency(toy, masks=12, batch=4, segments=(400,), antithetic=True, progress=False)
    out = torch.cat(seen) != toy.clip.field
    assert torch.equal(out[0::2], ~out[1::2])
    assert bool((made.out == 6).all())


def test_few_masks_warn() -> None:
    with pytest.warns(UserWarning, match="fewer than 10 times"):
        saliency(forced(), masks=4, segments=(100,), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saliency(forced(), on="states", masks=80, progress=False)


def test_segments() -> None:
    field = torch.randn(8, 40)
    labels = superpixels(field, 20)
    assert labels.shape == field.shape
    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    assert 2 < int(labels.max()) < 60
    assert int(superpixels(field, 1).max()) == 0
    assert segment_counts(3) == [12, 15, 18] and segment_counts(1, (10,)) == [1]
    with pytest.raises(InputError, match="silent"):
        superpixels(torch.ones(8, 40), 20)


def test_divergence_is_that_of_torch_and_survives_zeros() -> None:
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4, 9, generator=random).log_softmax(-1) for _ in range(2))
    want = torch.nn.functional.kl_div(q.double(), p.double(), reduction="none", log_target=True)
    torch.testing.assert_close(divergence(p, q).double(), want.sum(-1), rtol=1e-5, atol=1e-6)
    p[0, 3], q[1, 2] = -torch.inf, -torch.inf
    assert bool(torch.isfinite(divergence(p, q)).all())


@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients"])
def test_gradient_references(method: str) -> None:
    pytest.importorskip("captum")
    given = forced()
    found = gradients(given, method, steps=64, progress=False)
    assert found.shape == (3, 8, FRAMES) and bool((found >= 0).all()) and float(found.max()) > 0
    assert all(w.grad is None for w in given.clip.model.parameters())
    if method == "gradient_x_input":
        x = given.clip.field.clone().requires_grad_()
        value = given.of_input(x[None])[0, 1, given.text[1]]
        (slope,) = torch.autograd.grad(value, x)
        want = (slope * (x - x.mean(1, keepdim=True))).abs().detach()
        torch.testing.assert_close(found[1], want, rtol=1e-3, atol=1e-5)


# -- forced decoding -----------------------------------------------------------------------------
def test_rows_belong_to_the_step_that_predicts() -> None:
    given = forced()
    ids = torch.tensor([[1, 7, 50, 9]])
    whole = given.clip.model(input_features=given.clip.whole[None], decoder_input_ids=ids)
    want = whole.logits[0, :3].log_softmax(-1)
    torch.testing.assert_close(given.plain, want, rtol=1e-4, atol=1e-5)
    two = Clip(given.clip.model, given.clip.whole, FRAMES, prompt=[1, 33])
    assert Forced(two, [7]).rows == slice(1, 2)


def test_greedy_is_that_of_transformers() -> None:
    given = clip()
    settings = given.model.generation_config
    settings.suppress_tokens, settings.begin_suppress_tokens = [5, 6], [40]
    mine = given.transcribe(limit=10)[0]
    ids = torch.tensor([given.prompt])
    for _ in range(10):
        logits = given.model(input_features=given.whole[None], decoder_input_ids=ids).logits[0, -1]
        logits[[5, 6] + ([40] if ids.shape[1] == 1 else [])] = -torch.inf
        if int(logits.argmax()) == 2:
            break
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert mine == ids[0, 1:].tolist()
    both = given.transcribe(given.states.expand(3, -1, -1), limit=10)
    assert both == [mine] * 3


def test_a_cut_window_is_the_same_layers_on_fewer_positions() -> None:
    given = clip(margin=3)
    assert given.whole.shape[1] == 26 and given.states.shape == (13, 64) and given.stride == 2
    assert given.steps == 12 and given.uncut.states.shape == (16, 64)
    encoder = given.model.get_encoder()
    assert encoder.embed_positions.num_embeddings == 16  # the model's own is as it was
    assert encoder.config.max_source_positions == 16
    whole = clip(margin=32)
    torch.testing.assert_close(whole.states, whole.uncut.states)
    assert shortened(encoder, 16) is encoder


def test_time_first_models_work() -> None:
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_conv_layers=2,
        conv_channels=32, input_feat_per_channel=8, max_source_positions=100,
        max_target_positions=20, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Speech2TextForConditionalGeneration(config).eval()
    given = Clip(model, torch.randn(40, 8))
    assert given.field.shape == (8, 40) and given.stride == 4 and given.steps == 10
    found = saliency(Forced(given, [5, 6]), masks=8, segments=(100,), progress=False)
    assert found.map.shape == (2, 8, 40)
    with pytest.raises(InputError, match="no fixed length"):
        Clip(model, torch.randn(40, 8), margin=10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Forced(clip(), []), "empty"),
        (lambda: Forced(clip(), [7] * 64), "room for 63"),
        (lambda: Forced(clip(), [128]), "does not fit"),
        (lambda: Clip(tiny("whisper"), torch.zeros(8, 32)), "silent"),
        (lambda: Clip(tiny("whisper"), torch.full((8, 32), torch.nan)), "not finite"),
        (lambda: Clip(tiny("whisper"), torch.randn(8, 32), 40), "40"),
        (lambda: Clip(tiny("llama"), torch.randn(8, 32)), "no cross attention"),
        (lambda: Clip(tiny("t5"), torch.randn(8, 32)), "not a spectrogram"),
        (lambda: saliency(forced(), p=0.0), "p lies"),
        (lambda: saliency(forced(), masks=1), "two masks"),
        (lambda: saliency(forced(), masks=5, antithetic=True), "pairs"),
        (lambda: saliency(forced(), on="sound"), "on is"),
        (lambda: saliency(forced(), baseline="noise"), "baseline"),
        (lambda: saliency(forced(), geometry="grid"), "geometry"),
        (lambda: saliency(forced(), segments=()), "segments"),
        (lambda: saliency(forced(), width=0), "width"),
        (lambda: saliency(forced(), masks=2, state="/no/such/x", progress=False), "folder"),
        (lambda: gradients(forced(), "magic"), "method"),
    ],
)
def test_what_cannot_work_is_said(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_audio_that_cannot_be_read() -> None:
    from transformers import WhisperFeatureExtractor

    model, extractor = tiny("whisper"), WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    sound = torch.randn(8000).numpy()
    found, frames = features(model, extractor, sound)
    assert found.shape == (8, 100) and frames == 50
    for audio, words in (([], "empty"), ([0.0] * 99, "silent"), ([0.5] * 16001, "cut it")):
        with pytest.raises(InputError, match=words):
            features(model, extractor, audio)
    with pytest.raises(InputError, match="without a feature extractor"):
        features(model, None, sound)
    assert prompt(model, None) == [1]
