"""There and back again: what DDIM inversion and null-text inversion promise, on tiny pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from PIL import Image

from regard.errors import InputError, ReachError
from regard.parts.diffusion import inversion
from regard.parts.diffusion.inversion import (
    Inverted,
    encode_image,
    encode_text,
    invert,
    null_text,
    replay,
)
from regard.parts.diffusion.latents import decode
from regard.zoo.tiny_diffusion import tiny_pipeline

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def found(sd: Any) -> Inverted:
    noise = torch.Generator().manual_seed(0)
    return invert(sd, torch.randn(1, 4, 16, 16, generator=noise), PROMPT, steps=4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_way_back_is_exact_where_the_prediction_is_known(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser that always tells the true noise (or velocity) of one line is inverted exactly."""
    pipe = tiny_pipeline("sd")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
    noise = torch.Generator().manual_seed(0)
    clean, eps = torch.randn(2, 1, 4, 16, 16, generator=noise, dtype=torch.float64)
    alphas = pipe.scheduler.alphas_cumprod.double()

    def told(_: Any, latents: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
        a = alphas[int(time)]
        return eps if kind == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * clean

    monkeypatch.setattr(inversion, "predict", told)
    first = alphas[0].sqrt() * clean + (1 - alphas[0]).sqrt() * eps
    found = invert(pipe, first, PROMPT, steps=7)
    for time, latents in zip(found.timesteps.flip(0), found.latents[1:]):
        a = alphas[int(time)]
        assert torch.allclose(latents, a.sqrt() * clean + (1 - a).sqrt() * eps, atol=1e-5)
    ddim, back = inversion.schedule(pipe, 7), found.latents[-1]
    for n, time in enumerate(ddim.timesteps):
        back = ddim.step(told(None, back, time, back), time, back).prev_sample
        assert torch.allclose(back, found.latents[6 - n], atol=1e-5)


def test_noise_goes_back_as_diffusers_goes(sd: Any) -> None:
    """For pipelines that predict noise, step by step what `DDIMInverseScheduler` does."""
    from diffusers import DDIMInverseScheduler

    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = invert(sd, start, PROMPT, steps=5)
    back = DDIMInverseScheduler.from_config(sd.scheduler.config)
    back.set_timesteps(5)
    text = encode_text(sd, PROMPT).detach()
    with torch.no_grad():
        for time, want in zip(back.timesteps, found.latents[1:]):
            said = inversion.predict(sd, start, time, text)
            start = back.step(said, time, start).prev_sample
            assert torch.allclose(start, want, atol=1e-4)


def test_encode_and_decode(sd: Any) -> None:
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    latents = encode_image(sd, image)
    pixels = torch.full((1, 3, 32, 32), 0.0)
    for n, c in enumerate((200, 30, 30)):
        pixels[:, n] = c / 127.5 - 1
    want = sd.vae.encode(pixels).latent_dist.mean * sd.vae.config.scaling_factor
    assert torch.allclose(latents, want, atol=1e-5)
    (again,) = decode(sd, latents)
    assert again.size == (32, 32)
    sd.vae.register_to_config(shift_factor=0.25)
    try:
        scale = sd.vae.config.scaling_factor
        assert torch.allclose(encode_image(sd, image), want - 0.25 * scale, atol=1e-5)
        assert decode(sd, encode_image(sd, image))[0].tobytes() == again.tobytes()
    finally:
        sd.vae.register_to_config(shift_factor=None)


def test_null_text_lowers_the_error(sd: Any, found: Inverted) -> None:
    text = encode_text(sd, PROMPT).detach()
    errors = []
    for inner in (0, 5):
        nulls = null_text(sd, found, inner_steps=inner, lr=0.1, stop=None)
        out = replay(sd, found.latents[-1], [text] * 4, nulls)
        errors.append(float((out - found.latents[0]).square().mean()))
        if not inner:
            assert torch.equal(nulls[0], encode_text(sd, ""))
    assert errors[1] < 0.8 * errors[0]


def test_warm_start_and_stop(sd: Any, found: Inverted) -> None:
    empty = encode_text(sd, "").detach()
    cold = null_text(sd, found, inner_steps=1, warm_start=False, stop=None)
    # Adam's first update moves every number by the rate: with a cold start no further than that
    for step, one in enumerate(cold):
        assert float((one - empty).abs().max()) <= 1e-2 * (1 - step / 8) + 1e-6
    warm = null_text(sd, found, inner_steps=1, stop=None)
    assert float((warm[-1] - empty).abs().max()) > 1.5e-2
    never = null_text(sd, found, inner_steps=3, stop=lambda step: 1e9)
    assert all(torch.equal(one, empty) for one in never)


def test_replay_is_the_pipelines_own_sampling(sd: Any) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    want = sd(PROMPT, latents=noise, num_inference_steps=3, output_type="latent").images
    text, empty = encode_text(sd, PROMPT).detach(), encode_text(sd, "").detach()
    assert torch.equal(replay(sd, noise, [text] * 3, [empty] * 3), want)
    # an encoding of its own in each step is what that step is made with
    other = encode_text(sd, "a green star").detach()
    by_hand = noise
    ddim = inversion.schedule(sd, 3)
    with torch.no_grad():
        for step, time in enumerate(ddim.timesteps):
            given = (text, other, text)[step]
            said = inversion.predict(sd, by_hand, time, given)
            without = inversion.predict(sd, by_hand, time, empty)
            mixed = inversion.guided(said, without, 7.5)
            by_hand = ddim.step(mixed, time, by_hand).prev_sample
    got = replay(sd, noise, [text, other, text], [empty] * 3)
    assert torch.allclose(got, by_hand, atol=1e-4) and not torch.allclose(got, want, atol=1e-3)


def test_leaves_no_trace(sd: Any, found: Inverted) -> None:
    own, state = sd.scheduler, torch.random.get_rng_state()
    before = sd(PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=2).images[0]
    null_text(sd, found, inner_steps=1)
    text, empty = encode_text(sd, PROMPT).detach(), encode_text(sd, "").detach()
    with pytest.raises(InputError, match="4 encodings of the prompt but 1"):
        replay(sd, found.latents[-1], [text] * 4, [empty])
    replay(sd, found.latents[-1], [text], [empty])
    after = sd(PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=2).images[0]
    assert before.tobytes() == after.tobytes() and sd.scheduler is own
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in sd.unet.parameters())


def test_bad_input(sd: Any) -> None:
    with pytest.raises(InputError, match="must be multiples of"):
        encode_image(sd, Image.new("RGB", (31, 32)))
    with pytest.raises(InputError, match="give a PIL image"):
        encode_image(sd, "scene.png")
    with pytest.raises(InputError, match="latents are"):
        invert(sd, torch.zeros(2, 4, 16, 16), PROMPT)
    with pytest.raises(InputError, match="steps is 1 to 1000"):
        invert(sd, torch.zeros(1, 4, 16, 16), PROMPT, steps=0)
    for kind in ("sdxl", "sd3"):
        with pytest.raises(ReachError, match="use a StableDiffusionPipeline"):
            invert(tiny_pipeline(kind), torch.zeros(1, 4, 16, 16), PROMPT)
