"""SwapAnything: off is off, the context is the source's, and maps swap as explicit maps do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import regard
from regard.core import State
from regard.core.kernels import reference
from regard.errors import InputError, ReachError
from regard.parts.diffusion.inversion import encode_text, invert, null_text, replay
from regard.parts.diffusion.prompt_to_prompt import refined
from regard.reach import Call
from regard.reach.denoising import denoising
from regard.steer.swap_anything import concepts as swap_concepts
from regard.steer.swap_anything.method import Steps, SwapAnything, swap
from regard.steer.swap_anything.shape import object_mask, restyled, soften
from regard.zoo.tiny_diffusion import tiny_pipeline

SOURCE, TARGET = "a red circle and a blue square", "a green star and a blue square"
MASK = torch.zeros(16, 16)
MASK[3:11, 2:9] = 1


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


def pair(pipe: Any, handler: Any, steps: int = 3, after: Any = None) -> Tensor:
    text = torch.cat([encode_text(pipe, t) for t in (SOURCE, TARGET)]).detach()
    empty = encode_text(pipe, "").detach()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    handlers = [] if handler is None else [handler]
    return replay(pipe, noise, [text] * steps, [empty] * steps, handlers=handlers, after_step=after)


def made(pipe: Any, **steps: int) -> SwapAnything:
    return SwapAnything(MASK, refined(pipe.tokenizer, SOURCE, TARGET), Steps(**steps))


def test_no_steps_are_the_plain_images(pipe: Any) -> None:
    plain = pair(pipe, None)
    idle = made(pipe)
    assert torch.equal(pair(pipe, idle, after=idle.after_step), plain)
    assert torch.equal(pair(pipe, None), plain)  # no trace


def test_the_context_is_the_source_s_and_the_source_is_plain(pipe: Any) -> None:
    plain = pair(pipe, None)
    method = made(pipe, latents=3, cross=2, maps=2, outputs=1)
    method.soft = False
    found = pair(pipe, method, after=method.after_step)
    outside = ~(MASK > 0.5)
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    assert torch.equal(found[1][:, outside], found[0][:, outside])
    assert not torch.allclose(found[1][:, ~outside], plain[1][:, ~outside], atol=1e-3)
    assert not torch.allclose(plain[1][:, outside], plain[0][:, outside], atol=1e-3)


class Explicit(SwapAnything):
    """The same swaps on maps that are formed."""

    def after(self, call: Call, state: State) -> State | None:
        place = denoising(call)
        assert place.grid is not None
        inside = self.inside(place.grid)
        s, t = place.conditional.tolist()
        maps = reference.probabilities(call.q, call.k, None, call.scale)
        values = call.v[t].double()
        if call.site.kind == "cross":
            if place.step >= self.steps.cross:
                return None
            mixed = maps[s] @ self.edit.take.double() + maps[t] * self.edit.keep.double()
            p = torch.where(inside[:, None], maps[t], mixed)
            new = p @ values
        else:
            context = ~inside
            p = maps[t].clone()
            if place.step < self.steps.maps:
                both = context[:, None] & context
                p = torch.where(both, maps[s], p)
            new = p @ values
            if place.step < self.steps.outputs:
                new = torch.where(inside[:, None], new, maps[s] @ call.v[s].double())
        out = state.out.clone()
        out[t] = new.to(out.dtype)
        return State(out, state.lse)


def test_a_second_run_of_one_session_counts_its_own_steps(pipe: Any) -> None:
    def run() -> Tensor:
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

        def step_end(p: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            return {"latents": method.after_step(step, given["latents"])}

        out = pipe([SOURCE, TARGET], latents=noise.expand(2, -1, -1, -1), num_inference_steps=3,
                   output_type="latent", callback_on_step_end=step_end).images  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    method = made(pipe, latents=1, cross=2, maps=2, outputs=1)
    with torch.no_grad(), regard.apply(pipe, method):
        first, second = run(), run()
    assert torch.equal(first, second)


@pytest.mark.parametrize("steps", [{"maps": 2}, {"outputs": 1}, {"cross": 2},
                                   {"maps": 3, "outputs": 1, "cross": 1}])  # fmt: skip
def test_swaps_equal_explicit_maps(pipe: Any, steps: dict[str, int]) -> None:
    edit = refined(pipe.tokenizer, SOURCE, TARGET)
    fused = pair(pipe, SwapAnything(MASK, edit, Steps(**steps)))
    true = pair(pipe, Explicit(MASK, edit, Steps(**steps)))
    assert torch.allclose(fused, true, atol=2e-4)
    assert not torch.allclose(fused[1], pair(pipe, None)[1], atol=1e-3)


def test_restyling_gives_mean_and_spread_of_the_source() -> None:
    make = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, 9, generator=make), 3 + 2 * torch.randn(4, 9, 9, generator=make)
    inside = torch.zeros(9, 9, dtype=torch.bool)
    inside[2:6, 3:8] = True
    pooled = restyled(a, b, inside)
    assert torch.equal(pooled[:, ~inside], a[:, ~inside])
    assert pooled[:, inside].mean() == pytest.approx(float(b[:, inside].mean()), abs=1e-5)
    assert pooled[:, inside].std() == pytest.approx(float(b[:, inside].std()), abs=1e-5)
    own = restyled(a, b, inside, "channels")
    assert torch.allclose(own[:, inside].std(1), b[:, inside].std(1), atol=1e-5)
    with pytest.raises(InputError, match="all alike"):
        restyled(torch.ones(4, 9, 9), b, inside)
    with pytest.raises(InputError, match="at least 2"):
        restyled(a, b, torch.eye(9)[:, :1].expand(9, 9) * torch.eye(9) > 0, "channels")


def test_the_soft_mask_holds_the_hard_one() -> None:
    hard = MASK > 0.5
    soft = soften(hard)
    assert bool((soft[hard] == 1).all()) and 0 < float(soft[~hard].max()) < 1
    assert float(soft[-1, -1]) == 0


def test_a_whole_swap_and_a_guessed_mask(pipe: Any) -> None:
    picture = Image.new("RGB", (32, 32), "navy")
    inverted = invert(pipe, picture, SOURCE, steps=3)
    nulls = null_text(pipe, inverted, inner_steps=2)
    made = swap(pipe, inverted, nulls, MASK, TARGET, steps=Steps(latents=3), soft=False)
    outside = ~(MASK > 0.5)
    assert torch.equal(made.latents[1][:, outside], made.latents[0][:, outside])
    assert made.image.size == (32, 32) and made.error >= 0
    pulled = swap(pipe, inverted, nulls, MASK, TARGET, steps=Steps(latents=2), shape=0.5,
                  shape_words=[2, 3])  # fmt: skip
    assert not torch.equal(pulled.latents[1], made.latents[1])
    guess = object_mask(pipe, inverted, nulls, [3])
    assert guess.shape == (16, 16) and 0 < float(guess.mean()) < 1
    with pytest.raises(InputError, match="the mask is empty"):
        swap(pipe, inverted, nulls, torch.zeros(16, 16), TARGET)


def test_a_concept_is_learnt_and_the_pipeline_is_as_before(pipe: Any, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (32, 32), c) for c in ("red", "crimson")]
    before = {n: p.clone() for n, p in pipe.text_encoder.state_dict().items()}
    words = len(pipe.tokenizer)
    plain = encode_text(pipe, "a circle")
    start = pipe.text_encoder.get_input_embeddings().weight[swap_concepts.word_id(pipe, "circle")]
    same = swap_concepts.encode(pipe, "a circle", "circle", start.detach())
    assert torch.allclose(same, plain, atol=1e-6)
    vector = swap_concepts.learn(pipe, pictures, "circle", steps=3, lr=0.1)
    assert not torch.allclose(vector, start, atol=1e-3)
    swap_concepts.save(tmp_path / "c.safetensors", vector)
    assert torch.equal(swap_concepts.load(tmp_path / "c.safetensors"), vector)
    after = pipe.text_encoder.state_dict()
    assert all(torch.equal(after[n], p) for n, p in before.items()) and len(pipe.tokenizer) == words
    assert all(p.requires_grad for p in pipe.unet.parameters())
    with pytest.raises(InputError, match="tokens for this text encoder"):
        swap_concepts.learn(pipe, pictures, "circumference")
    with pytest.raises(InputError, match="have one size"):
        swap_concepts.learn(pipe, [*pictures, Image.new("RGB", (48, 32))], "circle")
    with pytest.raises(InputError, match="stands for the concept"):
        swap_concepts.encode(pipe, "a square", "circle", vector)


def test_a_stopped_concept_goes_on_as_if_it_never_stopped(pipe: Any, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (32, 32), c) for c in ("red", "crimson")]
    file, left = tmp_path / "c.safetensors", [3]

    def stop() -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    learn = partial(swap_concepts.learn, pipe, pictures, "circle", steps=5)
    whole = learn()
    with pytest.raises(KeyboardInterrupt):
        learn(file=file, progress=stop)
    assert not file.exists()
    made: list[int] = []
    assert torch.equal(learn(file=file, progress=lambda: made.append(1)), whole)
    assert len(made) == 2 and [p.name for p in tmp_path.iterdir()] == [file.name]
    # finished, it is taken up; of other pictures, or damaged, it is learnt anew
    assert torch.equal(learn(file=file, progress=stop), whole)
    other = swap_concepts.learn(pipe, pictures[:1], "circle", steps=5, file=file)
    assert not torch.equal(other, whole) and torch.equal(swap_concepts.load(file), other)
    file.write_bytes(b"half a file")
    with pytest.raises(InputError, match="is no learnt concept"):
        swap_concepts.load(file)
    assert torch.equal(learn(file=file), whole)


def test_what_cannot_be_swapped() -> None:
    edit = refined(tiny_pipeline("sd").tokenizer, SOURCE, TARGET)
    with pytest.raises(ReachError, match="cross-attention to text"):
        regard.apply(tiny_pipeline("sd3"), SwapAnything(MASK, edit, Steps(cross=1))).__enter__()
    with pytest.raises(InputError, match="height, width"):
        SwapAnything(torch.zeros(3), edit, Steps())


def test_the_neutral_settings_swap_nothing(pipe: Any) -> None:
    from regard.steer.swap_anything.card import CARD, Settings

    picture = Image.new("RGB", (32, 32), "navy")
    settings = Settings(**{**CARD.example, **CARD.neutral})
    swapped = regard.swap_object(
        pipe, picture, SOURCE, "red circle", "green star", mask=Image.new("L", (32, 32), 255),
        settings=settings,
    )  # fmt: skip
    inverted = invert(pipe, picture, SOURCE, steps=3)
    nulls = null_text(pipe, inverted, inner_steps=1)
    both = torch.cat([encode_text(pipe, t) for t in (SOURCE, TARGET)]).detach()
    assert torch.equal(swapped.latents, replay(pipe, inverted.latents[-1], [both] * 3, nulls))
    assert swapped.report() == {"cells": 256, "of": 256, "error": swapped.error}
