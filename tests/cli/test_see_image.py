"""regard see on a picture, regard trial vqa, regard train mma: what a person types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regard.trials.vqa import items

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
        (["see", "nothing.png"], "ask something"),
        (["see", "some text", "more"], "question about a picture"),
        (["trial", "vqa", "--with", "varr"], "Did you mean 'var'"),
        (["trial", "vqa", "--kinds", "smell"], "kinds are"),
        (["train", "mma", "--model", "gpt2"], "layout of shapes-vlm"),
        (["train", "mma", "--arms", "sideways", "--out", "x.json"], "arms are"),
        (["zoo", "card", "shapes-s"], "Did you mean 'shapes-sd'"),
        (["zoo", "train", "shapes-sd", "--out", "x", "--device", "cpu"], "--vae DIR"),
        (["zoo", "train", "shapes-vae", "--out", "x", "--tower", "y"], "not built on --tower"),
    ],
)
def test_bad_input(capsys: Any, words: list[str], says: str) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2 and says in " ".join(err.split()), err


def test_trial_vqa_prints_and_writes(capsys: Any, tmp_path: Path) -> None:
    data = tmp_path / "vqa.json"
    asked = ["--with", "visiondrop:tokens=16", "--questions", "3", "--kinds", "color,count"]
    code, _, err = run(capsys, "trial", "vqa", *asked, "--json", str(data))
    assert code == 0, err
    found = json.loads(data.read_text())["configurations"]
    assert set(found) == {"full", "visiondrop:tokens=16"} and found["full"]["all"]["asked"] == 6


def test_cards_are_shown(capsys: Any) -> None:
    code, out, _ = run(capsys, "zoo", "card", "shapes-sd")
    assert code == 0 and "binding" in out
