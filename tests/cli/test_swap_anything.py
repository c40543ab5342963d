"""`regard run swap-anything`: a picture, a concept that is learnt once, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regard.zoo.tiny_diffusion import tiny_pipeline

from .command import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("swap")
    tiny_pipeline("sd").save_pretrained(path / "pipe")
    Image.new("RGB", (40, 40), "navy").save(path / "a.png")
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (8, 8, 30, 30))
    mask.save(path / "m.png")
    (path / "concept").mkdir()
    Image.new("RGB", (32, 32), "orange").save(path / "concept" / "1.png")
    Image.new("RGB", (50, 40), "gold").save(path / "concept" / "2.png")
    (path / "text.png").write_text("no picture")
    (path / "text.safetensors").write_text("no concept")
    (path / "empty").mkdir()
    return path


def common(folder: Path, out: Path) -> list[str]:
    return ["run", "swap-anything", "--model", str(folder / "pipe"), "--image",
            str(folder / "a.png"), "--caption", "a red circle and a blue square", "--out",
            str(out), "--steps", "3", "--null-steps", "1"]  # fmt: skip


def test_a_swap_in_words(capsys: Any, folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out.png", tmp_path / "out.json"
    more = ["--object", "red circle", "--target", "green star", "--object", "blue square",
            "--target", "large dog", "--mask", str(folder / "m.png"),
            "--json", str(data)]  # fmt: skip
    code, _, err = run(capsys, *common(folder, out), *more)
    assert code == 0, err
    assert Image.open(out).size == (40, 40)
    first, second = json.loads(data.read_text())["swaps"]
    assert first["target"] == second["source"] == "a green star and a blue square"
    assert second["target"].endswith("a large dog") and second["guessed"] and not first["guessed"]
    assert 0 < first["cells"] < first["of"]


def test_a_concept_is_learnt_once(capsys: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    more = ["--object", "circle", "--concept", str(folder / "concept"), "--concept-steps", "2",
            "--mask", str(folder / "m.png")]  # fmt: skip
    code, _, err = run(capsys, *common(folder, out), *more)
    assert code == 0 and "concept:" in err, err
    kept = tmp_path / "concept.safetensors"
    stamp = kept.stat().st_mtime_ns
    code, _, err = run(capsys, *common(folder, out), *more)
    assert code == 0 and kept.stat().st_mtime_ns == stamp
    more[more.index("--concept") + 1] = str(kept)
    code, said, err = run(capsys, *common(folder, out), *more)
    assert code == 0 and "circle -> concept.safetensors" in said, err


def test_without_a_caption_what_was_taken_for_it_is_told(
    capsys: Any, folder: Path, tmp_path: Path
) -> None:
    words = common(folder, tmp_path / "out.png")
    at = words.index("--caption")
    more = ["--object", "circle", "--target", "star", "--mask", str(folder / "m.png")]
    code, _, err = run(capsys, *words[:at], *words[at + 2 :], *more)
    assert code == 0 and "taken to show 'a circle' and nothing else" in " ".join(err.split()), err
    code, _, err = run(capsys, *words, *more)
    assert code == 0 and "note:" not in err, err


def test_words_are_found_as_words(capsys: Any, folder: Path, tmp_path: Path) -> None:
    """A longer word that holds the object stays; the target may stand elsewhere already."""
    out, data = tmp_path / "out.png", tmp_path / "out.json"
    more = ["--caption", "a bigcircle, a Circle and a square", "--object", "circle", "--target",
            "square", "--mask", str(folder / "m.png"), "--json", str(data)]  # fmt: skip
    code, _, err = run(capsys, *common(folder, out), *more)
    assert code == 0, err
    (told,) = json.loads(data.read_text())["swaps"]
    assert told["target"] == "a bigcircle, a square and a square"


def test_another_pipeline_is_named(capsys: Any, folder: Path, tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path / "sd3")
    more = ["--object", "circle", "--target", "star", "--model", str(tmp_path / "sd3")]
    code, _, err = run(capsys, *common(folder, tmp_path / "o.png"), *more)
    assert code == 2 and "StableDiffusion3Pipeline cannot be inverted here: use a" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--object", "circle"], "--target TEXT, or --concept FOLDER"),
        (["--object", "circle", "--target", "a", "--target", "b"], "one for each"),
        (["--object", "dog", "--target", "cat"], "'dog' is not in"),
        (["--object", "circle", "--target", "star", "--keep", "1,2"], "four shares"),
        (["--object", "circle", "--target", "star", "--insert"], "--insert needs"),
        (["--object", "circle", "--concept", "EMPTY"], "holds no pictures"),
        (["--object", "circle", "--concept", "nowhere"], "there is no folder nowhere"),
        (["--object", "circle", "--target", "star", "--mask", "no.png"], "there is no picture"),
        (["--object", "circle", "--target", "star", "--mask", "text.png"], "is no picture that"),
        (["--object", "circle", "--target", "star", "--image", "text.png"], "is no picture that"),
        (["--object", "circle", "--concept", "text.safetensors"], "is no learnt concept"),
        (["--object", "circle", "--concept", "gone.safetensors"], "there is no folder"),
    ],
)
def test_bad_input(capsys: Any, folder: Path, tmp_path: Path, more: list[str], says: str) -> None:
    given = [str(folder / w.lower()) if (folder / w.lower()).exists() else w for w in more]
    code, _, err = run(capsys, *common(folder, tmp_path / "o.png"), *given)
    assert code == 2 and says in " ".join(err.split()), err
    assert not (tmp_path / "o.png").exists()
