"""The reproductions on pictures run from end to end, and settle their claims by stated rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regard import zoo
from regard.lab import reproduce
from regard.lab.reproduce import harness
from regard.shape.mma import claims as mma
from regard.shrink.visiondrop import claims as visiondrop
from regard.steer.structured_diffusion import claims as structured_diffusion
from regard.steer.structured_diffusion.claims import crossing, mcnemar, prompts
from regard.steer.var import claims as var
from regard.zoo.pipelines import load_pipeline


@pytest.fixture(scope="module")
def shapes() -> tuple[Any, Any]:
    return zoo.load("shapes-vlm")


def settled(result: harness.Result, claims: Any) -> None:
    assert [c.key for c in result.claims] == [c.key for c in claims]
    for found, stated in zip(result.claims, claims):
        if stated.judge is None:
            assert found.verdict == "needs scale" and found.command
        else:
            assert found.verdict == stated.judge(found.values) and found.here and found.control


def drawn(result: harness.Result, folder: Path) -> None:
    assert (folder / f"{result.slug}.quick.png").read_bytes()[:4] == b"\x89PNG"
    assert result.picture and f"![{result.picture}]" in reproduce.page_text([result])


def test_var(shapes: tuple[Any, Any], tmp_path: Path) -> None:
    result = reproduce.run("var", quick=True, model=shapes, out=tmp_path)
    settled(result, var.CLAIMS)
    drawn(result, tmp_path)


def test_visiondrop(
    shapes: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visiondrop, "KINDS", ("color",))
    monkeypatch.setattr(visiondrop, "ROUNDS", 1)
    result = reproduce.run("visiondrop", quick=True, model=shapes, out=tmp_path)
    settled(result, visiondrop.CLAIMS)
    drawn(result, tmp_path)
    cost = result.claims[6].values
    assert 0.2 < cost["operations"] < 0.7 and 0.2 < cost["bytes"] < 0.7


@pytest.mark.slow  # it trains nine tiny models
def test_mma(tmp_path: Path) -> None:
    result = reproduce.run("mma", quick=True, out=tmp_path)
    settled(result, mma.CLAIMS)
    drawn(result, tmp_path)
    assert result.claims[0].verdict == "reproduced"  # true of untrained models as well


def test_the_picture_of_mma_is_that_of_the_stored_trainings() -> None:
    """A column a training and a row a kind, whatever arms and seeds are there."""
    runs = {
        f"{arm} {seed}": {"arm": arm, "seed": seed, "accuracy": {"relation": 0.2, "color": at,
                                                                 "all": at, "asked": 9}}
        for arm, seed, at in (("mma", 0, 0.9), ("causal", 1, 0.1), ("causal", 0, 0.5))
    }  # fmt: skip
    whole = mma.picture({"runs": runs})
    fewer = mma.picture({"runs": {n: r for n, r in runs.items() if r["arm"] == "causal"}})
    assert whole.width > fewer.width and whole.height == fewer.height
    cell = (whole.width - 194) // 3
    row = [whole.getpixel((170 + cell * n + 8, whole.height - 60)) for n in range(3)]
    assert sum(row[1]) > sum(row[0]) > sum(row[2])  # causal 0, causal 1, mma 0; dark is right


def test_structured_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_diffusion, "SHOWN", 1)
    pipe = load_pipeline("shapes-sd")
    result = reproduce.run("structured-diffusion", quick=True, model=(pipe, None), out=tmp_path)
    settled(result, structured_diffusion.CLAIMS)
    drawn(result, tmp_path)


def test_the_pieces_of_the_structured_comparison() -> None:
    assert mcnemar(0, 6) == mcnemar(6, 0) == pytest.approx(2 / 64)
    text = "a small red circle and a large blue square on a gray background"
    (start, end), *rest = crossing(text)
    assert text[start:end] == "circle and a large" and not rest
    for one in prompts(5):
        a, b = one.things
        assert a.color != b.color and a.shape != b.shape and " and " in one.caption()
