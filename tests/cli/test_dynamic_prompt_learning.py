"""regard run dynamic-prompt-learning: files that are there, steps that are kept, clear errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cli.command import run

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")
pytest.importorskip("sklearn", reason="scikit-learn is part of the extra 'steer'")

from regard.steer.dynamic_prompt_learning.command import compared
from regard.zoo.scenes import scene
from regard.zoo.tiny_diffusion import tiny_pipeline

RUN = ("run", "dynamic-prompt-learning")
CAPTION = "a red circle and a blue square"
QUICK = ("--steps", "2", "--inner-steps", "1", "--null-steps", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    tiny_pipeline("sd").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(scene(5, things=(2,)).draw(32)).save(path)
    return path


def test_an_edit_side_by_side(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "new" / "out", tmp_path / "out.json"
    words = (
        *RUN, "--image", str(picture), "--caption", CAPTION, "--model", str(folder), *QUICK,
        "--edit", "blue square -> green square", "--out", str(out), "--json", str(data),
    )  # fmt: skip
    code, text, err = run(capsys, *words)
    assert code == 0, err
    made = json.loads(data.read_text())
    assert made["target"] == "a red circle and a green square"
    assert made["nouns"] == ["circle", "square"] and len(made["losses"]) == 2
    # weights by chance look at the edited words from everywhere: there is no outside
    assert "looked at everywhere" in err
    for name in ("plain", "learnt"):
        assert made["outside"][name] is None
        assert f"{name}: change of the picture {made['inside'][name]:.4f} of 1" in text
    assert "overlap of maps, circle / square" in text
    names = {p.name for p in out.glob("*.png")}
    assert names == {
        "plain-source.png", "plain-edit.png", "learnt-source.png", "learnt-edit.png",
        "sheet.png", "maps.png",
    }  # fmt: skip
    page = (out / "index.html").read_text()
    assert page.count("<img") == 12 and "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    kept = sorted(out.glob("*/step-*.safetensors"))
    assert len(kept) == 4 and not list(out.rglob("*.part*"))
    # the same again takes the finished steps up, and says the same
    stamps = [p.stat().st_mtime_ns for p in kept]
    code, again, err = run(capsys, *words)
    assert code == 0 and again == text
    assert [p.stat().st_mtime_ns for p in kept] == stamps
    assert json.loads(data.read_text())["losses"] == made["losses"]


def test_the_change_is_told_inside_and_outside_of_the_edited_words() -> None:
    from PIL import Image

    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 2:] = True
    source, image = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    image.paste("white", (4, 0, 8, 8))
    edited = SimpleNamespace(mask=mask, source=source, image=image)
    learned = SimpleNamespace(losses=[{"error": 0.5}], report=dict)
    told = compared(dict.fromkeys(("plain", "learnt"), (learned, edited)))
    assert told["outside"] == {"plain": 0, "learnt": 0}
    assert told["inside"] == {"plain": 1, "learnt": 1}


@pytest.mark.parametrize(
    "more",
    [
        ("--refine", "a red circle and a small blue square"),
        ("--reweight", "blue=3.0", "--nouns", "square"),
    ],
)
def test_other_edits(
    folder: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    code, text, err = run(
        capsys, *RUN, "--image", str(picture), "--caption", CAPTION, "--model", str(folder),
        "--steps", "1", "--inner-steps", "0", "--null-steps", "0", *more, "--out", str(tmp_path),
        "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(text)
    assert made["outside"]["plain"] is None and made["inside"]["plain"] > 0  # no part had to stay
    # without updates of the nouns both are the same
    assert made["inside"]["plain"] == made["inside"]["learnt"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("--caption", CAPTION), "say what to change"),
        (("--caption", CAPTION, "--edit", "cat -> dog"), "'cat' is not in"),
        (("--caption", CAPTION, "--edit", "a -> one"), "stands 2 times"),
        (("--caption", CAPTION, "--edit", "blue"), "old words -> new words"),
        (("--caption", CAPTION, "--edit", "red -> blue", "--refine", "x"), "mutually exclusive"),
        (("--caption", CAPTION, "--reweight", "blue"), "word=2.0"),
        (("--caption", " ", "--edit", "red -> blue"), "the prompt is empty"),
        (("--caption", CAPTION, "--edit", "red -> blue", "--nouns", "cat"), "'cat' is not in"),
        (("--caption", "and", "--refine", "a cat"), "no noun was found"),
    ],
)
def test_bad_input(
    folder: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    match: str,
) -> None:
    code, _, err = run(
        capsys, *RUN, "--image", str(picture), "--model", str(folder), "--out", str(tmp_path / "o"),
        *given,
    )  # fmt: skip
    assert code == 2 and match in " ".join(err.split())
    assert not (tmp_path / "o").exists()


def test_bad_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], picture: Path
) -> None:
    from PIL import Image

    text = tmp_path / "no.png"
    text.write_text("no picture")
    odd = tmp_path / "odd.png"
    Image.new("RGB", (31, 32)).save(odd)
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none.png", "there is no picture"),
        (text, "is no picture that can be read"),
        (odd, "both sides must be multiples of"),
    ]
    for path, match in cases:
        code, _, err = run(
            capsys, *RUN, "--image", str(path), "--caption", CAPTION, "--edit", "red -> blue",
            "--model", str(folder), "--out", str(tmp_path / "out"), *QUICK,
        )  # fmt: skip
        assert code == 2 and match in " ".join(err.split())
