"""Steps of the sampler, and the forwards of a step that are not the prompt's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from regard.core import State
from regard.reach import Call, Handler, Session
from regard.reach.denoising import denoising

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

import diffusers

from regard.parts.diffusion.words import WordMaps
from regard.zoo.tiny_diffusion import tiny_pipeline

from .. import pipelines

PROMPT = "a red circle and a blue square"
run = partial(pipelines.run, prompt=PROMPT)


class Log(Handler):
    """Run, step, time and rows of every forward, and the share of each text key in it."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int, float, tuple[bool, ...]]] = []
        self.shares: list[torch.Tensor] = []

    def sites(self, sites: list[Any]) -> list[Any]:
        return [s for s in sites if s.text][:1]

    def after(self, call: Call, state: State) -> None:
        at = denoising(call)
        assert at.rows is not None and at.text is not None
        self.places.append((at.run, at.step, at.timestep, tuple(at.rows.tolist())))
        p = (call.scale * call.q.double() @ call.k.double().transpose(-1, -2)).softmax(-1)
        self.shares.append(p[at.conditional][:, :, at.image, at.text].mean(1))

    def steps(self) -> list[int]:
        return [step for _, step, _, _ in self.places]


@pytest.mark.parametrize(
    ("kind", "scheduler", "forwards"),
    [
        ("sd", "HeunDiscreteScheduler", [0, 0, 1, 1, 2]),
        ("sd", "KDPM2DiscreteScheduler", [0, 0, 1, 1, 2]),
        ("sd", "PNDMScheduler", [0, 1, 1, 2]),
        ("sd", "EulerDiscreteScheduler", [0, 1, 2]),
        ("sd", "DPMSolverMultistepScheduler", [0, 1, 2]),
        ("flux", "FlowMatchHeunDiscreteScheduler", [0, 0, 1, 1, 2]),
    ],
)
def test_steps_are_those_of_the_sampler(kind: str, scheduler: str, forwards: list[int]) -> None:
    pipe, log = tiny_pipeline(kind), Log()
    own = pipe.scheduler.config
    skip = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    if kind == "flux":
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        # the pipeline hands over sigmas, which this sampler does not take
        pipe.scheduler.set_timesteps = partial(_without_sigmas, pipe.scheduler)
    else:
        betas = {"beta_schedule": own.beta_schedule, "steps_offset": 1}
        pipe.scheduler = getattr(diffusers, scheduler)(**betas, **skip)
    maps = WordMaps(["circle"], by="step")
    run(pipe, log, maps, num_inference_steps=3)
    assert log.steps() == forwards
    assert maps.labels == [0, 1, 2]


def _without_sigmas(
    scheduler: Any, device: Any = None, sigmas: Any = None, mu: float = 1.0
) -> None:
    type(scheduler).set_timesteps(scheduler, len(sigmas), device)


def test_a_pass_with_skipped_layers_is_no_step_and_no_map() -> None:
    """Skip-layer guidance runs the prompt once more, through a broken model."""
    pipe, log, maps = tiny_pipeline("sd3"), Log(), WordMaps(["circle"])
    kwargs = {"guidance_scale": 4.0, "num_inference_steps": 4}
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.9}  # fmt: skip
    run(pipe, log, maps, **kwargs, **skip)
    extra = [rows for _, _, _, rows in log.places if len(rows) == 1]
    assert extra and not any(map(any, extra))
    assert sorted(set(log.steps())) == [0, 1, 2, 3]
    assert len(log.places) == 4 + len(extra)
    assert all(rows == (False, True) for _, _, _, rows in log.places if len(rows) == 2)


def test_a_copy_of_the_prompts_rows_is_perturbed() -> None:
    """Perturbed guidance puts the prompt's row twice into one batch: the first is the prompt's."""
    sd, log = tiny_pipeline("sd"), Log()
    with Session(sd, [log]), torch.no_grad():
        embeds, empty = sd.encode_prompt(PROMPT, "cpu", 1, True)
        sd.scheduler.set_timesteps(2)
        latents = torch.randn(1, 4, 16, 16)
        sd.unet(torch.cat([latents] * 3), 5, torch.cat([empty, embeds, embeds]))
    assert log.places[0][3] == (False, True, False)


def test_forwards_with_and_without_the_prompt_are_told_by_their_text() -> None:
    """Whichever comes first, and with a negative prompt equal to nothing in the table."""
    sd, log = tiny_pipeline("sd"), Log()
    latents = torch.randn(1, 4, 16, 16)
    with Session(sd, [log]), torch.no_grad():
        embeds, empty = sd.encode_prompt(PROMPT, "cpu", 1, True, "a star")
        sd.scheduler.set_timesteps(2)
        for time in (5, 3):
            sd.unet(latents, time, embeds)
            sd.unet(latents, time, empty)
            latents = latents / 2
        sd.unet(torch.cat([latents] * 2), 1, torch.cat([embeds, empty]))  # Z-Image's order
    assert [rows for *_, rows in log.places] == [
        (True,),
        (False,),
        (True,),
        (False,),
        (True, False),
    ]
    assert log.steps() == [0, 0, 1, 1, 2]
    assert {run for run, *_ in log.places} == {0}


def test_corrector_passes_count_in_the_mean_of_their_step() -> None:
    pipe, log, maps = tiny_pipeline("sd"), Log(), WordMaps(["circle"], by="step")
    pipe.scheduler = diffusers.HeunDiscreteScheduler(beta_schedule="scaled_linear")
    maps.layers = [0]
    run(pipe, log, maps, num_inference_steps=2)
    column = pipe.tokenizer(PROMPT).input_ids.index(
        pipe.tokenizer("circle", add_special_tokens=False).input_ids[0]
    )
    own = [s[..., column] for s in log.shares]
    assert log.steps() == [0, 0, 1]
    want = (own[0] + own[1]) / 2
    assert torch.allclose(maps.map("circle", label=0).flatten(1).double(), want, atol=1e-6)
    assert torch.allclose(maps.map("circle", label=1).flatten(1).double(), own[2], atol=1e-6)
