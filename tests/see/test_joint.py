"""The four corners of joint attention equal those of explicit maps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.parts.diffusion.joint import JointMaps
from regard.parts.diffusion.words import WordMaps
from regard.zoo.tiny_diffusion import tiny_pipeline

from .. import pipelines
from ..denoisers import CASES, denoiser, forward

PROMPT = "a red zebra and a blue square"
run = partial(pipelines.run, prompt=PROMPT, width=48)


class Explicit(Handler):
    """The mean of the whole map in float64, and which tokens are what."""

    total: Any = 0
    count = 0

    def sites(self, sites: list[Any]) -> list[Any]:
        return [s for s in sites if s.kind == "joint"]

    def after(self, call: Call, state: State) -> None:
        assert call.denoising is not None
        self.place = call.denoising
        if not len(self.place.conditional):
            return
        k = call.k.double().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        scores = call.scale * call.q.double() @ k.transpose(-1, -2)
        scores = scores.masked_fill(~call.mask.cells(*scores.shape[-2:]), -torch.inf)
        self.total = self.total + scores.softmax(-1)[self.place.conditional].mean(1)
        self.count += 1

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("guidance", [{}, {"negative_prompt": "a star"}])
def test_four_relations_of_a_pipeline(kind: str, guidance: dict[str, Any]) -> None:
    if guidance:
        guidance = guidance | {"guidance_scale" if kind == "sd3" else "true_cfg_scale": 4.0}
    pipe, explicit, plain = tiny_pipeline(kind), Explicit(), WordMaps(["zebra", "square"])
    maps = JointMaps(["zebra", "square"], patches=[(1, 2), (7, 11)])
    run(pipe, maps, explicit, plain, **guidance)
    mean, place = explicit.mean, explicit.place
    assert place.prompts is not None and place.text is not None and place.grid == (8, 12)
    image, first = place.image, place.text.start
    columns = [
        [first + c for c in place.prompts.columns(0, PROMPT.index(w), PROMPT.index(w) + len(w))]
        for w in ("zebra", "square")
    ]
    assert len(columns[0]) > 4  # a word of several pieces
    for n, word in enumerate(("zebra", "square")):
        assert torch.equal(maps[word], plain[word])
        want = mean[:, columns[n]].mean(1)
        assert torch.allclose(maps.sees(word).flatten(1).double(), want[:, image], atol=1e-6)
        for m in range(2):
            assert abs(float(maps.between[0, n, m]) - float(want[:, columns[m]].mean())) < 1e-6
    for row, column in ((1, 2), (7, 11)):
        want = mean[:, image.start + 12 * row + column, image].view(1, 8, 12)
        assert torch.allclose(maps.patch((row, column)).double(), want, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("CogVideoX", "Mochi", "ZI"))])
def test_four_relations_of_a_denoiser(name: str) -> None:
    """A video's grid has frames; keys that are masked or grouped are read as they are."""
    model, explicit = denoiser(name), Explicit()
    grid = CASES[name].grid
    assert grid is not None
    patch = tuple(n - 1 for n in grid)
    maps = JointMaps(tokens={"one": [1], "two": [2, 3]}, patches=[patch])
    with regard.apply(model, maps, explicit):
        forward(model, CASES[name].inputs)
    mean, place = explicit.mean, explicit.place
    assert place.text is not None
    image, first = place.image, place.text.start
    assert maps.sees("two").shape == (2, *grid) == maps.patch(patch).shape
    want = mean[:, [first + 2, first + 3]].mean(1)
    assert torch.allclose(maps.sees("two").flatten(1).double(), want[:, image], atol=1e-6)
    assert torch.allclose(maps.between[:, 1, 0].double(), want[:, first + 1], atol=1e-6)
    want = mean[:, image.stop - 1, image]
    assert torch.allclose(maps.patch(patch).flatten(1).double(), want, atol=1e-6)


def test_several_prompts_and_a_second_run() -> None:
    pipe = tiny_pipeline("flux")
    maps, alone = (JointMaps(["red", "square"], patches=[(0, 0)]) for _ in range(2))
    prompts = [PROMPT, "a red circle"]
    with regard.apply(pipe, maps):
        run(pipe)
        run(pipe, prompt=prompts)
    run(pipe, alone)
    assert torch.isnan(maps.sees("square")[1]).all() and torch.isnan(maps.between[1, 0, 1])
    assert torch.allclose(maps.sees("red")[0], alone.sees("red")[0], atol=1e-5)
    assert torch.allclose(maps.patch((0, 0))[0], alone.patch((0, 0))[0], atol=1e-5)
    assert torch.allclose(maps.between[0], alone.between[0], atol=1e-5)


def test_what_cannot_be_read(sd: Any) -> None:
    with pytest.raises(ReachError, match="WordMaps shows"):
        regard.apply(sd, JointMaps(["red"]))
    pipe = tiny_pipeline("flux")
    with pytest.raises(InputError, match=r"patch \(8, 0\) lies outside the image"):
        run(pipe, JointMaps(["red"], patches=[(8, 0)]))
    run(pipe, maps := JointMaps(["red"], patches=[(0, 0)]))
    with pytest.raises(InputError, match="not pointed at"):
        maps.patch((1, 1))
    with pytest.raises(InputError, match="no map of 'green'"):
        maps.sees("green")
    with pytest.raises(RuntimeError, match="nothing was seen"):
        JointMaps(["red"]).sees("red")
