"""The diffusion commands: files that are there, numbers that fit, errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.command import run

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.zoo.tiny_diffusion import tiny_pipeline

PROMPT = "a red circle and a blue square"
RUN = ("run", "structured-diffusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    tiny_pipeline("sd").save_pretrained(path)
    return path


def test_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    out, data = tmp_path / "new" / "out", tmp_path / "out.json"
    code, text, err = run(
        capsys, *RUN, PROMPT, "--model", str(folder), "--seeds", "0,3", "--steps", "2",
        "--parser", "rules", "--out", str(out), "--json", str(data),
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(data.read_text())
    assert made["phrases"] == ["a red circle", "a blue square"] and made["seeds"] == [0, 3]
    assert len(made["change"]) == 2 and min(made["change"]) > 0
    assert "'a red circle', 'a blue square'" in text
    images = {p.name: Image.open(p) for p in out.glob("*.png")}
    assert sorted(images) == [
        "plain-0.png", "plain-3.png", "sheet.png", "structured-0.png", "structured-3.png",
    ]  # fmt: skip
    assert images["plain-0.png"].tobytes() != images["structured-0.png"].tobytes()
    assert images["plain-0.png"].tobytes() != images["plain-3.png"].tobytes()
    page = (out / "index.html").read_text()
    assert page.count("<img") == 4 and "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert not list(out.glob("*.part*"))


def test_the_plain_column_is_the_pipelines_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from PIL import Image

    args = (*RUN, PROMPT, "--model", str(folder), "--seeds", "1", "--steps", "2")
    code, _, err = run(capsys, *args, "--phrase", "a red circle", "--conjunction", "--out",
                       str(tmp_path), "--size", "48x32", "--guidance", "3")  # fmt: skip
    assert code == 0, err
    pipe = tiny_pipeline("sd")
    noise = torch.Generator().manual_seed(0)
    want = pipe(PROMPT, generator=noise, num_inference_steps=2, width=48, height=32,
                guidance_scale=3.0).images[0]  # fmt: skip
    got = Image.open(tmp_path / "plain-0.png")
    assert got.size == (48, 32) and got.tobytes() == want.tobytes()


def test_a_prompt_without_phrases_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, err = run(
        capsys, *RUN, "circle", "--model", str(folder), "--seeds", "1", "--steps", "1",
        "--parser", "rules", "--out", str(tmp_path), "--json", "-",
    )  # fmt: skip
    assert code == 0 and json.loads(text)["change"] == [0.0]
    assert "no noun phrase" in err


def test_errors_come_before_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "sd3"
    tiny_pipeline("sd3").save_pretrained(other)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "model_index.json").write_text('{"_class_name": "MyPipeline"}')
    file = tmp_path / "file"
    file.write_text("x")
    good = ("--model", str(folder), "--parser", "rules", "--out", str(tmp_path / "o"))
    cases: list[tuple[tuple[str, ...], str]] = [
        ((" ", *good), "the prompt is empty"),
        ((PROMPT, *good, "--seeds", "0"), "at least one seed"),
        ((PROMPT, *good, "--seeds", "1,x"), "--seeds takes"),
        ((PROMPT, *good, "--size", "30x32"), "multiples of"),
        ((PROMPT, *good, "--size", "big"), "--size is 512 or"),
        ((PROMPT, *good, "--phrase", "a green dog"), "'a green dog' is not found"),
        (
            (PROMPT, *good[:2], "--parser", "nltk"),
            "rules, not 'nltk'",
        ),
        ((PROMPT, "--model", str(other), "--parser", "rules"), "this model has none"),
        ((PROMPT, "--model", str(model), "--parser", "rules"), "a transformers model, not a"),
        ((PROMPT, "--model", str(strange), "--parser", "rules"), "'MyPipeline'"),
        ((PROMPT, "--model", str(file), "--parser", "rules"), "is a file"),
        ((PROMPT, "--model", str(tmp_path / "none"), "--parser", "rules"), "there is no folder"),
        ((PROMPT, "--model", str(folder), "--parser", "rules", "--out", str(file)), "is a file"),
        ((PROMPT, *good, "--json", str(tmp_path / "no" / "x.json")), "does not exist"),
    ]
    capsys.readouterr()
    for args, message in cases:
        code, _, err = run(capsys, *RUN, *args)
        assert code == 2 and message in err, (args, err)
        assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_see_shows_every_word_and_phrase(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, data = tmp_path / "out.html", tmp_path / "out.json"
    code, text, err = run(
        capsys, "see", PROMPT, "--model", str(folder), "--steps", "3", "--html", str(html),
        "--json", str(data), "--seed", "4",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(data.read_text())
    names = [word["name"] for word in made["words"]]
    assert names == [
        "a", "red", "circle", "and", "a (2)", "blue", "square", "a red circle", "a blue square",
    ]  # fmt: skip
    assert made["grid"] == [16, 16] and made["steps"] == 3 and made["seed"] == 4
    circle = made["words"][2]
    row, column = circle["peak"]
    assert circle["map"][row][column] == pytest.approx(circle["max"], rel=1e-3)
    assert "a blue square" in text
    page = html.read_text()
    # the image, a map a word, then three steps and seven layers for each
    assert page.count("<img") == 1 + len(names) * (1 + 3 + 7)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_see_of_one_layer_of_joint_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline("flux").save_pretrained(tmp_path / "flux")
    code, text, _ = run(
        capsys, "see", "a red circle", "--model", str(tmp_path / "flux"), "--steps", "1",
        "--layers", "1", "--heads", "0", "--json", "-",
    )  # fmt: skip
    assert code == 0
    assert [word["name"] for word in json.loads(text)["words"]] == ["a", "red", "circle"]


def test_see_maps_the_words_that_fit_and_names_the_rest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, text = tmp_path / "out.json", "a red circle and " + "cat dog " * 10 + "near a star"
    code, _, err = run(
        capsys, "see", text, "--model", str(folder), "--steps", "1", "--json", str(data)
    )
    assert code == 0 and "not read by the text encoder" in err and "'star'" in err
    made = json.loads(data.read_text())
    names = [word["name"] for word in made["words"]]
    assert "circle" in names and "star" not in names and "'star'" in made["notes"][-1]


def test_see_refuses_what_is_for_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (
            ("see", PROMPT, "--model", str(folder), "--compare"),
            "--compare is for a text or a sound",
        ),
        (("see", "...", "--model", str(folder)), "holds no word"),
        (("see", PROMPT, "--model", str(folder), "--layers", "77"), "layer 77 does not look"),
        (("see", PROMPT, "--steps", "3"), "--steps is for the prompt of an image"),
    ):
        code, _, err = run(capsys, *args)
        assert code == 2 and message in err and err.count("\n") == 1, err
