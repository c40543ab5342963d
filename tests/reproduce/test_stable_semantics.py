"""The claims of StableSemantics: run end to end on a tiny pipeline, judges that judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")
pytest.importorskip("datasets", reason="datasets is part of the extra 'data'")

from regard.lab.reproduce.harness import Journal, Setup
from regard.lab.trials.scenes import overlap
from regard.reach import Session
from regard.see.stable_semantics import claims as own
from regard.see.stable_semantics.method import ChunkMaps, Recipe
from regard.zoo.tiny_diffusion import tiny_pipeline


def test_it_runs_on_a_tiny_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "STEPS", 2)
    monkeypatch.setattr(own, "GRID", 16)
    pipe = tiny_pipeline("sd")
    done = own.measure(Setup(pipe, None, "tiny", True, Journal(None, {}), False))
    assert [c.key for c in done.claims] == [c.key for c in own.CLAIMS if c.judge]
    assert done.picture is not None and "One caption a row" in done.picture[1]
    found = {c.key: c for c in done.claims}
    assert found["builder"].verdict == "reproduced"
    assert all(c.verdict == "needs scale" or (c.here and c.control) for c in done.claims)


def test_the_last_step_alone_is_what_one_more_step_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "STEPS", 3)
    pipe: Any = tiny_pipeline("sd")
    recipe = Recipe(grid=16, resize="bilinear", parser="rules")

    def run(*handlers: ChunkMaps) -> None:
        with Session(pipe, list(handlers)), torch.no_grad():
            pipe("a red circle", num_inference_steps=3, generator=torch.Generator().manual_seed(0))

    class First(ChunkMaps):
        def after(self, call: Any, state: Any) -> None:
            if call.denoising.step < 2:
                super().after(call, state)

    every, first, last = (c([[(2, 5)]], recipe) for c in (ChunkMaps, First, own.Last))
    run(every, first, last)
    assert torch.allclose(3 * every.maps(), 2 * first.maps() + last.maps(), atol=1e-6)


def test_the_sheet_shows_what_the_judge_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing in place of the generated image: masks are those of the things, a missing colour
    is black.
    """
    drawn, given = own.scenes(1)[0], []
    seen = own.ChunkMaps([], own.Recipe())
    monkeypatch.setattr(own, "ChunkMaps", lambda *_: seen)
    monkeypatch.setattr(seen, "maps", lambda: torch.rand(1, 2, 8, 8))
    monkeypatch.setattr(own, "_drawn", lambda *_: [Image.fromarray(drawn.draw(64))])
    monkeypatch.setattr(own, "sheet", lambda *what: given.append(what))
    own._picture(None, [drawn], 1)
    monkeypatch.setattr(own, "_drawn", lambda *_: [Image.new("RGB", (64, 64), "white")])
    own._picture(None, [drawn], 1)
    there, gone = (rows[0] for rows, _, _ in given)
    for place, mask in zip((2, 4), drawn.masks(64)):
        got = np.array(there[place].convert("L")) > 0
        assert overlap(got, mask) > 0.8
        assert there[place].size == (64, 64) and not np.array(gone[place].convert("L")).any()
    assert given[0][2] == [drawn.caption().split(" on a ")[0]]


def test_the_area_under_the_curve_is_a_share_of_pairs() -> None:
    values, mask = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([False, True, False, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in (2.0, 5.0) for b in (1.0, 2.0)]
    assert own.auc(values, mask) == pytest.approx(sum(pairs) / 4)
    assert own.auc(torch.ones(4), mask) == 0.5


def image(shift: float, relation: str = "left of") -> dict[str, Any]:
    return {
        "relation": relation,
        "centroids": [[0.5 - shift, 0.5], [0.5 + shift, 0.5]],
        "auc": [dict.fromkeys(own.KINDS, 0.5) | {"average": 0.5 + shift}],
        "iou": [[0.1] * 9],
        "small": [[shift, 0.0, 1.0, 2.0]],
    }


def test_places_and_maps_are_judged_by_their_rules() -> None:
    claims = {c.key: c for c in own.CLAIMS}
    right = [[image(0.4)], [image(0.4)], [image(0.4)]]
    wrong = [[image(-0.4)], [image(0.4, "right of")]]
    assert own._places(claims["places"], right).verdict == "reproduced"
    assert own._places(claims["places"], wrong).verdict == "not reproduced"
    assert own._maps(claims["maps"], right).verdict == "reproduced"
    assert own._maps(claims["maps"], wrong[:1]).verdict == "not reproduced"


def test_maps_alike_over_seeds_and_not() -> None:
    claims = {c.key: c for c in own.CLAIMS}
    a, b = [0.0, 1.0, 2.0, 3.0], [3.0, 0.0, 1.0, -2.0]
    alike = [[{"small": [m]}, {"small": [m]}] for m in (a, b, a, b)]
    mixed = [[{"small": [a]}, {"small": [b]}] for _ in range(4)]
    assert own._seeds(claims["seeds"], alike).verdict == "reproduced"
    assert own._seeds(claims["seeds"], mixed).verdict == "not reproduced"
