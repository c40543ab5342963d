"""The claims of Dynamic Prompt Learning run end to end on a tiny pipeline, and are judged right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")
pytest.importorskip("sklearn", reason="scikit-learn is part of the extra 'steer'")

from PIL import Image

from regard.errors import InputError
from regard.lab import reproduce
from regard.steer.dynamic_prompt_learning import claims as dpl
from regard.zoo.scenes import COLORS, WORDS
from regard.zoo.tiny_diffusion import tiny_pipeline


def test_it_runs_on_a_tiny_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    result = reproduce.run("dynamic-prompt-learning", quick=True, model=(pipe, None), out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in dpl.CLAIMS]
    for claim in result.claims:
        assert claim.verdict == "needs scale" or (claim.here and claim.control and claim.values)
    kept = json.loads((tmp_path / "dynamic-prompt-learning.quick.json").read_text())
    assert set(kept["claims"][0]["values"]["arms"]) == set(dpl.ARMS)
    assert Image.open(tmp_path / "dynamic-prompt-learning.quick.png").width > 5 * 32
    assert WORDS  # the tiny tokenizer spells words it does not know


def part(plain: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    base = {
        "overlap": [0.2] * len(dpl.THRESHOLDS), "pairs": 0.9, "ground": 0.5, "updates": 1,
        "outside": 0.1, "inside": 0.1, "again": 0.0, "done": 0.0,
    }  # fmt: skip
    arms = {arm: dict(base) for arm in dpl.ARMS}
    arms["plain"] |= plain
    arms["full"] |= full
    return {"arms": arms}


def test_verdicts_follow_the_numbers() -> None:
    better = {
        "overlap": [0.3] * len(dpl.THRESHOLDS), "pairs": 0.7, "ground": 0.4, "outside": 0.05,
        "done": 1.0,
    }  # fmt: skip
    settled = dpl._settle([part({}, better)] * 4)
    wanted = {"leakage", "localisation", "together", "local", "success"}
    assert {k for k, c in settled.items() if c.verdict == "reproduced"} == wanted
    assert settled["alone"].verdict == "not reproduced"
    # the other way round nothing holds
    settled = dpl._settle([part(better, {})] * 4)
    assert {c.verdict for k, c in settled.items() if k != "together"} == {"not reproduced"}
    # a small gain is a part
    little = {"overlap": [0.22] * len(dpl.THRESHOLDS), "pairs": 0.8, "outside": 0.09}
    settled = dpl._settle([part({}, little)] * 4)
    assert [settled[k].verdict for k in ("leakage", "localisation", "local", "success")] == [
        "partly", "partly", "partly", "not reproduced",
    ]  # fmt: skip


def test_scenes_and_edits() -> None:
    for number in range(dpl.FIRST, dpl.FIRST + 16):
        drawn = dpl._scene(number)
        first, second = drawn.things
        assert first.color == second.color and first.shape != second.shape
        caption, target, words, new = dpl.recolored(drawn)
        assert caption.count(words[0]) == 1 == target.count(words[1]) and new in COLORS
        # a word of the caption that is swapped, and nothing else
        assert len(caption.split()) == len(target.split())
        changed = [a != b for a, b in zip(caption.split(), target.split())]
        assert sum(changed) == 1


def test_overlap_at_every_threshold() -> None:
    maps = torch.tensor([[[1.0, 0.5], [0.2, 0.0]]])
    got = dpl.overlaps(maps, torch.tensor([[[True, False], [False, False]]]))
    for threshold, value in zip(dpl.THRESHOLDS, got):
        inside = sum(x > threshold for x in (1.0, 0.5, 0.2))
        assert value == pytest.approx(1 / inside, abs=1e-6)


def test_the_judgement_of_an_edit() -> None:
    drawn = dpl._scene(dpl.FIRST)
    masks = drawn.masks(64)
    picture = drawn.draw(64)
    _, _, _, new = dpl.recolored(drawn)

    def judged(image: numpy.ndarray) -> dict[str, float]:
        own = Image.fromarray(picture)
        return dpl._edit(own, own, Image.fromarray(image), masks, new, drawn)

    assert judged(picture) == {"outside": 0.0, "inside": 0.0, "again": 0.0, "done": 0.0}
    right = picture.copy()
    right[masks[1]] = COLORS[new]
    assert judged(right)["done"] == 1.0 and judged(right)["outside"] == 0.0
    spilt = right.copy()
    spilt[masks[0]] = COLORS[new]
    assert judged(spilt)["done"] == 0.0 and judged(spilt)["outside"] > 0.01


def test_another_model_is_refused(tmp_path: Path) -> None:
    from regard.zoo import tiny

    with pytest.raises(InputError, match="need a Stable Diffusion pipeline"):
        reproduce.run("dynamic-prompt-learning", model=(tiny("llama"), None), out=tmp_path)
