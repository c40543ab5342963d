"""The claims of SwapAnything run from end to end and settle by their rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from regard.lab import reproduce
from regard.steer.swap_anything import claims as swap_anything
from regard.steer.swap_anything.claims import Size, scenes
from regard.zoo.pipelines import load_pipeline


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_anything, "Size", lambda *_: Size(1, 2, 0))
    pipe = load_pipeline("shapes-sd")
    result = reproduce.run("swap-anything", quick=True, model=(pipe, None), out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in swap_anything.CLAIMS]
    for found, stated in zip(result.claims, swap_anything.CLAIMS):
        if stated.judge is not None:
            assert found.verdict == stated.judge(found.values) and found.here and found.control
    assert result.claims[0].verdict == "reproduced"  # outside the mask nothing moves, ever
    assert (tmp_path / "swap-anything.quick.png").is_file()


def test_the_scenes_change_one_colour() -> None:
    for one, color in scenes(6):
        a, b = one.things
        assert color not in (a.color, b.color) and a.shape != b.shape
