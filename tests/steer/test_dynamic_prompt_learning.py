"""Dynamic Prompt Learning: losses by hand, gradients that repair, edits that are off when off."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")
pytest.importorskip("sklearn", reason="scikit-learn is part of the extra 'steer'")

from regard.errors import InputError, ReachError
from regard.parts.diffusion.encodings import encode_with
from regard.parts.diffusion.inversion import encode_text, invert, null_text, replay
from regard.parts.diffusion.means import MeanMaps
from regard.steer.dynamic_prompt_learning.card import Term
from regard.steer.dynamic_prompt_learning.editing import edit
from regard.steer.dynamic_prompt_learning.learned import Learned
from regard.steer.dynamic_prompt_learning.losses import background, balance, disjoint, leaked
from regard.steer.dynamic_prompt_learning.method import DynamicPromptLearning
from regard.zoo.tiny_diffusion import tiny_pipeline

CAPTION = "a red circle and a blue square"
NOUNS = ["circle", "square"]
QUICK = DynamicPromptLearning(NOUNS, inner_steps=2, null_steps=1, steps=2)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def learned(sd: Any, picture: torch.Tensor) -> Learned:
    return QUICK.learn(sd, picture, CAPTION)


# -- the losses -----------------------------------------------------------------------------------
def test_losses_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    whole = torch.rand(5, 4, 9, generator=random, dtype=torch.float64).softmax(-1)
    columns = [[2], [4, 5], [6]]
    maps = torch.stack([whole[..., c].mean(-1) for c in columns])
    flat = [m.flatten() for m in maps]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b) / (a.norm() * b.norm()))

    pairs = [cosine(flat[a], flat[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert math.isclose(float(disjoint(maps)), sum(pairs) / 3, rel_tol=1e-6)
    ground = torch.rand(5, 4, generator=random) > 0.5
    want = sum(cosine(f, ground.double().flatten()) for f in flat) / 3
    assert math.isclose(float(leaked(maps, ground)), want, rel_tol=1e-6)

    # balancing: softmax over columns 1 to 7 of 100 times the map, blurred, the weakest noun's peak
    sharp = (100 * whole.float()).numpy()
    peaks = []
    for own in columns:
        soft = [
            [
                sum(math.exp(sharp[y][x][c]) for c in own)
                / sum(math.exp(sharp[y][x][c]) for c in range(1, 8))
                for x in range(4)
            ]
            for y in range(5)
        ]
        best = 0.0
        for y in range(5):
            for x in range(4):
                total = weight = 0.0
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        w = math.exp(-(dy * dy + dx * dx))
                        # reflect: -1 is 1, and one behind the last is the one before it
                        yy = abs(y + dy) if y + dy < 5 else 3
                        xx = abs(x + dx) if x + dx < 4 else 2
                        total, weight = total + w * soft[yy][xx], weight + w
                best = max(best, total / weight)
        peaks.append(best)
    assert math.isclose(float(balance(whole, columns)), 1 - min(peaks), rel_tol=1e-4)
    assert float(balance(whole, columns, smooth=False)) < float(balance(whole, columns))


def test_a_single_place_never_satisfies_balance() -> None:
    whole = torch.zeros(6, 6, 5)
    whole[..., 1] = 1.0
    whole[3, 3] = torch.tensor([0, 0, 1.0, 0, 0])
    assert math.isclose(float(balance(whole, [[2]])), 1 - 0.3319, abs_tol=1e-3)


def test_nothing_to_compare_is_no_loss() -> None:
    one = torch.rand(1, 3, 3, requires_grad=True)
    assert disjoint(one).item() == 0 == leaked(one, torch.zeros(3, 3)).item()
    (grad,) = torch.autograd.grad(disjoint(one) + leaked(one, torch.zeros(3, 3)), one)
    assert not grad.any()


def test_targets() -> None:
    for term, want in (
        (Term(1.0, 25, 0.3), (0.300, 0.110, 0.042)),
        (Term(0.05, 25, 0.9), (0.900, 0.331, 0.127)),
        (Term(0.05, 50, 0.7), (0.700, 0.425, 0.263)),
    ):
        got = [term.target(i, 50) for i in (0, 25, 49)]
        assert all(math.isclose(a, b, abs_tol=6e-4) for a, b in zip(got, want))


def test_background_is_what_no_noun_looks_at() -> None:
    """Three blocks of an 8 x 8 image that look at themselves; nouns look at two of them."""
    block = torch.zeros(8, 8, dtype=torch.long)
    block[:4, :4], block[5:, 5:] = 1, 2
    looks = (block.flatten()[:, None] == block.flatten()).float()
    looks = looks / looks.sum(1, keepdim=True)
    maps = torch.stack([(block == n).float() for n in (1, 2)])
    want = block == 0
    assert torch.equal(background(looks, maps, grid=(8, 8), clusters=3), want)
    # maps of half the size are enlarged for the question, and the answer made smaller
    small = torch.stack([(block == n).float()[::2, ::2] for n in (1, 2)])
    got = background(looks, small, grid=(8, 8), clusters=3)
    assert got.shape == (4, 4) and torch.equal(got, want[::2, ::2])
    # a share that no map reaches leaves everything background
    assert background(looks, maps, grid=(8, 8), clusters=3, share=0.999999).sum() >= want.sum()


# -- learning -------------------------------------------------------------------------------------
def test_maps_are_the_models_own(sd: Any, picture: torch.Tensor) -> None:
    """Averaged maps equal the softmax of the attention modules, made by hand."""
    from regard.reach.session import Session

    text, made = encode_text(sd, CAPTION).detach(), []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        hidden, context = args[0], kwargs["encoder_hidden_states"]
        if hidden.shape[1] == 256:
            q = module.to_q(hidden).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            k = module.to_k(context).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            made.append((q @ k.transpose(-1, -2) * module.scale).softmax(-1)[0])

    cross = [m for n, m in sd.unet.named_modules() if n.endswith("attn2")]
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in cross]
    looks = MeanMaps(256, 256)
    with torch.no_grad(), Session(sd.unet, [looks]):
        sd.unet(picture, 501, encoder_hidden_states=text)
    for one in hooks:
        one.remove()
    want = torch.cat(made).mean(0).reshape(16, 16, -1)
    assert torch.allclose(looks.words(), want, atol=1e-5)
    selves, grid = looks.selves()
    assert grid == (16, 16) and torch.allclose(selves.sum(-1), torch.ones(256), atol=1e-4)


def test_learning_lowers_the_losses(sd: Any, picture: torch.Tensor) -> None:
    base = replace(QUICK, steps=1, null_steps=0, lr=2e-2, share=0.9)
    hard = Term(1.0, 25, -1.0)  # a target that is never reached
    for name in ("balance", "disjoint", "background"):
        terms: dict[str, Any] = {
            n: Term(0.0, 25, 0.3) for n in ("balance", "disjoint", "background")
        }
        terms[name] = hard
        before = replace(base, inner_steps=0, **terms).learn(sd, picture, CAPTION).losses[0]
        after = replace(base, inner_steps=6, **terms).learn(sd, picture, CAPTION).losses[0]
        assert after[name] < before[name] - 1e-4, name
        assert after["updates"] == 6 and before["updates"] == 0


def test_gradients_are_those_of_differences(sd: Any, picture: torch.Tensor) -> None:
    """The gradient through fused attention and text encoder, against a finite difference."""
    from regard.reach.session import Session

    columns = QUICK.find(sd, CAPTION)
    at = [c for own in columns for c in own]
    rows = sd.text_encoder.get_input_embeddings().weight.detach()[[7, 9]].clone()
    looks = MeanMaps(256, 0)

    def loss(value: torch.Tensor) -> torch.Tensor:
        looks.clear()
        with Session(sd.unet, [looks]):
            sd.unet(picture, 501, encoder_hidden_states=encode_with(sd, CAPTION, at, value))
        whole = looks.words()
        maps = torch.stack([whole[..., own].mean(-1) for own in columns])
        return balance(whole, columns) + disjoint(maps)

    (grad,) = torch.autograd.grad(loss(rows.requires_grad_(True)), rows)
    way = grad / grad.norm()
    with torch.no_grad():
        rise = (loss(rows + 3e-3 * way) - loss(rows - 3e-3 * way)) / 6e-3
    assert math.isclose(float(rise), float(grad.norm()), rel_tol=0.05)


def test_targets_end_the_updates(sd: Any, picture: torch.Tensor) -> None:
    easy = Term(1.0, 1e9, 2.0)
    method = replace(QUICK, inner_steps=5, balance=easy, disjoint=easy, background=easy)
    learned = method.learn(sd, picture, CAPTION)
    assert [x["updates"] for x in learned.losses] == [0, 0]
    table = sd.text_encoder.get_input_embeddings().weight.detach()
    ids = sd.tokenizer(CAPTION)["input_ids"]
    plain = table[[ids[c] for own in learned.columns for c in own]]
    assert all(torch.equal(rows, plain) for rows in learned.tokens)


@pytest.mark.parametrize("warm", [True, False])
def test_without_token_updates_it_is_null_text_inversion(
    sd: Any, picture: torch.Tensor, warm: bool
) -> None:
    learned = replace(QUICK, inner_steps=0, warm_start=warm).learn(sd, picture, CAPTION)
    nulls = null_text(sd, invert(sd, picture, CAPTION, steps=2), inner_steps=1, warm_start=warm)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(learned.nulls, nulls))
    text = encode_text(sd, CAPTION).detach()
    assert all(torch.allclose(e, text, atol=1e-6) for e in learned.embeds(sd))


def test_rows_move_and_go_into_the_nouns_alone(sd: Any, learned: Learned) -> None:
    assert learned.columns == [[3], [7]] and learned.tokens.shape == (2, 2, 32)
    plain, own = encode_text(sd, CAPTION).detach(), learned.embeds(sd)
    # a causal encoder: columns before the first noun stay as they are
    assert torch.allclose(own[0][:, :3], plain[:, :3], atol=1e-6)
    assert not torch.allclose(own[0][:, 3], plain[:, 3], atol=1e-4)
    # tokens carry over: the second step begins where the first ended
    first, second = learned.tokens
    assert float((second - first).abs().max()) < 2.1 * QUICK.lr
    # a target without the second noun carries the first alone
    target = "a red circle and a blue star"
    want = encode_with(sd, target, [3], learned.tokens[1][:1]).detach()
    assert torch.allclose(learned.embeds(sd, target)[1], want, atol=1e-6)


def test_edits(sd: Any, learned: Learned) -> None:
    plain = replay(sd, learned.inverted.latents[-1], learned.embeds(sd), learned.nulls)
    from regard.parts.diffusion.latents import decode

    (source,) = decode(sd, plain)
    for target, more in (
        ("a red circle and a green square", {"local": ("blue square", "green square")}),
        ("a red circle and a small blue square", {}),
        (CAPTION, {"weights": {"red": 4.0}}),
    ):
        made = edit(sd, learned, target, **more)
        assert made.source.size == made.image.size == (32, 32)
        assert made.image.tobytes() != made.source.tobytes()
        import numpy

        difference = numpy.abs(numpy.asarray(made.source, int) - numpy.asarray(source, int))
        assert difference.max() <= 2
    # nothing asked for, nothing changed
    same = edit(sd, learned, CAPTION, cross_steps=0, self_steps=0)
    assert same.image.tobytes() == same.source.tobytes()


def test_it_goes_on_where_it_stopped(
    sd: Any, picture: torch.Tensor, learned: Learned, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    ticks = []

    def stop() -> None:
        ticks.append(1)
        if len(ticks) == 3:  # two of the inversion, one step learnt
            raise Stop

    with pytest.raises(Stop):
        QUICK.learn(sd, picture, CAPTION, folder=tmp_path, progress=stop)
    first = tmp_path / "step-000.safetensors"
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == [first.name]
    stamp = first.stat().st_mtime_ns
    whole = QUICK.learn(sd, picture, CAPTION, folder=tmp_path)
    assert first.stat().st_mtime_ns == stamp
    assert torch.equal(whole.tokens, learned.tokens)
    assert all(torch.equal(a, b) for a, b in zip(whole.nulls, learned.nulls))
    # half a file is made again; other settings take nothing up
    first.write_bytes(b"half")
    again = QUICK.learn(sd, picture, CAPTION, folder=tmp_path)
    assert torch.equal(again.tokens, learned.tokens)
    other = replace(QUICK, inner_steps=0).learn(sd, picture, CAPTION, folder=tmp_path)
    assert [x["updates"] for x in other.losses] == [0, 0]


def test_leaves_no_trace(sd: Any, learned: Learned, picture: torch.Tensor) -> None:
    def image() -> bytes:
        noise = torch.Generator().manual_seed(0)
        made: bytes = sd(CAPTION, generator=noise, num_inference_steps=2).images[0].tobytes()
        return made

    before, state = image(), torch.random.get_rng_state()
    again = QUICK.learn(sd, picture, CAPTION)
    assert torch.equal(again.tokens, learned.tokens)
    assert torch.equal(state, torch.random.get_rng_state())
    edit(sd, again, "a red circle and a blue star")
    assert image() == before
    for part in (sd.unet, sd.text_encoder):
        assert all(p.requires_grad and p.grad is None for p in part.parameters())
    assert not sd.text_encoder.get_input_embeddings()._forward_hooks


def test_leakage_report(learned: Learned) -> None:
    report = learned.report()
    assert report["nouns"] == NOUNS and len(report["losses"]) == 2
    said = report["leakage"]
    assert list(said) == ["before", "after"]
    one = learned.before.flatten(1)
    want = float(one[0] @ one[1] / one[0].norm() / one[1].norm())
    assert math.isclose(said["before"]["pairs"]["circle / square"], want, rel_tol=1e-5)
    assert set(said["after"]["background"]) == set(NOUNS)


def test_a_noun_of_several_pieces(sd: Any, picture: torch.Tensor) -> None:
    made = replace(QUICK, nouns=["zebu"], steps=1).learn(sd, picture, "a zebu and a star")
    pieces = len(made.columns[0])
    assert pieces > 1 and made.tokens.shape[1] == pieces and made.maps.shape[0] == 1
    assert made.losses[0]["disjoint"] == 0


def test_bad_input(sd: Any, picture: torch.Tensor) -> None:
    for bad, match in (
        ({"nouns": "circle"}, "nouns is a list"),
        ({"nouns": []}, "one word or more"),
        ({"inner_steps": -1}, "of at least 0, not -1"),
        ({"clusters": 1}, "clusters is a whole number of at least 2"),
    ):
        with pytest.raises(InputError, match=match):
            replace(QUICK, **bad)
    with pytest.raises(InputError, match="weight of 0 or more"):
        Term(-1, 25, 0.3)
    for nouns, match in (
        (["cat"], "'cat' is not in"),
        (["a"], "stands 2 times"),
        (["circle", "red circle"], "share a word"),
    ):
        with pytest.raises(InputError, match=match):
            replace(QUICK, nouns=nouns).learn(sd, picture, CAPTION)
    with pytest.raises(ReachError, match="raise map_cells"):
        replace(QUICK, map_cells=1).learn(sd, picture, CAPTION)
    with pytest.raises(ReachError, match="use a StableDiffusionPipeline"):
        QUICK.learn(tiny_pipeline("sd3"), picture, CAPTION)
