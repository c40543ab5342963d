"""regard see on a picture, regard trial vqa, regard train mma: what a person types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regard.lab.trials.vqa import items

from .command import run


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("see") / "scene.png"
    items(1, ["neighbour"], seed=8, held_out=False)[0].picture.save(path)
    return path


def test_see_answers_and_writes_a_page(capsys: Any, picture: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "out.html", tmp_path / "out.json"
    question = "how many things <are> there?"
    more = ["--html", str(page), "--json", str(data)]
    code, _, err = run(capsys, "see", str(picture), question, *more)
    assert code == 0, err
    found = json.loads(data.read_text())
    assert found["answer"] and found["grid"] == [8, 8]
    assert all(len(word["map"]) == 64 for word in found["words"])
    assert any(word["generated"] for word in found["words"]) or len(found["answer"].split()) == 1
    text = page.read_text()
    assert "&lt;are&gt;" in text and "<are>" not in text and "data:image/png" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["see", "nothing.png", "what?"], "there is no picture"),
        (["see", "some text", "more"], "question about a picture"),
        (["trial", "vqa", "--with", "varr"], "Did you mean 'var'"),
        (["trial", "vqa", "--kinds", "smell"], "kinds are"),
        (["train", "mma", "--model", "gpt2"], "layout of shapes-vlm"),
        (["train", "mma", "--arms", "sideways", "--out", "x.json"], "arms are"),
        (["zoo", "card", "shapes-s"], "Did you mean 'shapes-sd'"),
        (["zoo", "train", "shapes-sd", "--out", "x", "--device", "cpu"], "--vae DIR"),
        (["zoo", "train", "shapes-vae", "--out", "x", "--tower", "y"], "not built on --tower"),
        (["zoo", "train", "smol-vlm", "--out", "x", "--start", "y"], "not built on --start"),
        (["zoo", "train", "shapes-vlm", "--out", "x", "--start", "y"], "y holds no shapes-vlm"),
    ],
)
def test_bad_input(capsys: Any, words: list[str], says: str) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2 and says in " ".join(err.split()), err


def test_a_picture_needs_a_question(capsys: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "white.png")
    code, _, err = run(capsys, "see", str(tmp_path / "white.png"))
    assert code == 2 and "ask something" in " ".join(err.split())


def test_trial_vqa_prints_and_writes(capsys: Any, tmp_path: Path) -> None:
    data = tmp_path / "vqa.json"
    asked = ["--with", "visiondrop:tokens=16", "--questions", "3", "--kinds", "color,count"]
    code, _, err = run(capsys, "trial", "vqa", *asked, "--json", str(data))
    assert code == 0, err
    found = json.loads(data.read_text())["configurations"]
    assert set(found) == {"full", "visiondrop:tokens=16"} and found["full"]["all"]["asked"] == 6


def test_mma_trains_and_goes_on_from_what_is_there(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    small = ["--steps", "2", "--batch", "8", "--seeds", "1", "--pool", "64", "--device", "cpu"]
    given = ["train", "mma", *small, "--tower-minutes", "0.01", "--out", str(out), "--arms"]
    for arms in ("causal", "causal,mma"):
        code, said, err = run(capsys, *given, arms)
        assert code == 0, err
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["causal, seed 0", "mma, seed 0"] and "mma, seed 0" in said
    assert (
        runs["causal, seed 0"]["change by question"] == 0 < runs["mma, seed 0"]["accuracy"]["asked"]
    )
    given[given.index("8")] = "9"
    code, _, err = run(capsys, *given, "mma")
    assert code == 2 and "other settings" in err
    given[given.index("9")] = "8"
    shutil.rmtree(tmp_path / ".runs-tower")
    code, _, err = run(capsys, *given, "text first")
    assert code == 2 and "vision tower that is not here" in " ".join(err.split())


def test_cards_are_shown(capsys: Any) -> None:
    code, out, _ = run(capsys, "zoo", "card", "shapes-sd")
    assert code == 0 and "binding" in out


def test_a_text_model_reads_no_picture(capsys: Any, picture: Path) -> None:
    code, _, err = run(capsys, "see", str(picture), "what is this?", "--model", "smollm2-135m")
    assert code == 2 and "reads no pictures" in err
