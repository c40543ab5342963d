"""`regard run var` and `regard run visiondrop` on a saved checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from regard.zoo.tiny_vlm import tiny_processor

from ..vlms import DIMS, SINK_WORD, TAU, planted
from .command import run

ASK = f"w{SINK_WORD} <image> w5 w6 w7 w8"
FOUND = ["--dims", ",".join(map(str, DIMS)), "--tau", str(TAU), "--nonsink-ratio", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, and two pictures."""
    path = tmp_path_factory.mktemp("vlm")
    planted("llava").save_pretrained(path)
    tiny_processor().save_pretrained(path)
    picture = Image.new("RGB", (64, 48), "navy")
    ImageDraw.Draw(picture).ellipse((10, 8, 40, 38), fill="orange")
    picture.save(path / "a.png")
    picture.rotate(90).save(path / "b.png")
    return path


def common(folder: Path) -> list[str]:
    return ["--model", str(folder), "--image", str(folder / "a.png"), "-n", "4", "--prompt", ASK]


def test_var(capsys: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sinks.png"
    code, said, err = run(
        capsys, "run", "var", *common(folder), *FOUND, "--out", str(out), "--json", "-"
    )
    assert code == 0, err
    found = json.loads(said)
    assert found["image_tokens"] == [16] and found["grids"] == [[4, 4]] and found["kl"] > 0
    report = found["report"]
    assert [r["layer"] for r in report["layers"]] == [0, 1, 2]
    first = report["layers"][0]
    assert [s["position"] for s in first["text_sinks"]] == [0] and "token" in first["text_sinks"][0]
    assert 0 < len(first["image_sinks"]) < 16
    assert 0 < first["rows_changed"] < first["rows"] and 0 < first["moved"] < 0.6
    assert found["settings"]["dims"] == report["dims"] == list(DIMS)
    before, after = (report["attention"][n] for n in ("before", "after"))
    assert len(before) == len(after) == 16 and sum(after) > sum(before)
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and drawn.width > 4 * 384
    assert [p.name for p in tmp_path.iterdir()] == ["sinks.png"]
    code, said, err = run(capsys, "run", "var", *common(folder), *FOUND, "--move", "0")
    said = " ".join(said.split())
    assert code == 0 and "The answers are the same" in said and "attention to the pictures" in said


def test_var_finds_the_dims(capsys: Any, folder: Path) -> None:
    args = ["--dims", "auto", "--tau", str(TAU), "--json", "-"]
    code, said, err = run(capsys, "run", "var", *common(folder), *args)
    assert code == 0, err
    assert json.loads(said)["settings"]["dims"] == [DIMS[0]]
    ask = [*args[:-2], "--preset", "hallucination", "--rule", "released_code", "--json", "-"]
    code, said, err = run(capsys, "run", "var", *common(folder), *ask)
    settings = json.loads(said)["settings"]
    assert (settings["nonsink_ratio"], settings["variant"]) == (0.5, "released")


def test_visiondrop(capsys: Any, folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "kept.png", tmp_path / "kept.json"
    args = [*common(folder), "--image", str(folder / "b.png"), "--tokens", "7"]
    args[args.index(ASK)] = ASK.replace("<image>", "<image> <image>")
    code, said, err = run(
        capsys, "run", "visiondrop", *args, "--out", str(out), "--json", str(data)
    )
    assert code == 0, err
    found = json.loads(data.read_text())
    report = found["report"]
    assert found["image_tokens"] == [16, 16] and report["mean_tokens"] == 7
    assert found["settings"]["budget"] == 7 and "tokens" not in found["settings"]
    for image in report["images"]:
        assert image["tokens_by_layer"] == [10, 8, 6, 4]
        assert [c["before_layer"] for c in image["cuts"]] == [0, 1, 2, 3]
        for cut in image["cuts"]:
            assert sorted(m for t in cut["tokens"] for m in t) == list(range(16))
    length, rows = found["prompt_tokens"], [10, 8, 6, 4]
    plain, changed = (found[n]["prompt_bytes"] for n in ("plain", "changed"))
    assert changed * 4 * length == plain * sum(length - 32 + 2 * n for n in rows)
    assert "7.0 tokens a picture" in " ".join(said.split())
    with Image.open(out) as drawn:
        assert drawn.width > 5 * 384


def test_cuts_by_hand(capsys: Any, folder: Path) -> None:
    args = [*common(folder), "--json", "-", "--cuts"]
    code, said, err = run(capsys, "run", "visiondrop", *args, "1:6/2,3:3/1")
    assert code == 0, err
    assert json.loads(said)["report"]["images"][0]["tokens_by_layer"] == [16, 8, 8, 4]
    code, _, err = run(capsys, "run", "visiondrop", *args, "8")
    assert code == 2 and "no list of cuts" in err


def test_mma(capsys: Any, folder: Path) -> None:
    """Derived like the others; it has settings, a report, and no picture to draw."""
    code, said, err = run(capsys, "run", "mma", *common(folder), "--turns", "all", "--json", "-")
    assert code == 0, err
    found = json.loads(said)
    assert found["kl"] > 0 and found["settings"]["turns"] == "all"
    assert found["report"]["rows"][0] == {"image": 16, "question": 5, "opened": 16}
    code, _, err = run(capsys, "run", "mma", *common(folder), "--out", "a.png")
    assert code == 2 and "draws no picture" in err


@pytest.mark.parametrize("verb", [["see"], ["run", "act", "-n", "2", "--prompt"]])
def test_text_alone(capsys: Any, folder: Path, verb: list[str]) -> None:
    """The processor of such a model reads pictures first, its tokenizer text."""
    code, said, err = run(capsys, *verb, "w5 w6 w7 w8", "--model", str(folder), "--json", "-")
    assert code == 0, err
    assert len(json.loads(said).get("tokens", "1234")) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["var", "--dims", "5,9", "--tau", "9"], "bound is 8.0"),
        (["var", "--tau", "4"], "find_sink_dims"),
        (["var", "--dims", "x"], "no dims are known"),
        (["var", "--preset", "art"], "preset is one of"),
        (["var", "--move", "2", "--dims", "5"], "share of the attention"),
        (["var", "--model", "TEXTMODEL", "--dims", "5", "--tau", "4"], "reads no pictures"),
        (["visiondrop", "--tokens", "2"], "cannot be reached"),
        (["visiondrop", "--ratio", "0.5", "--budget", "7"], "mutually exclusive"),
        (["visiondrop", "--score", "loud"], "score is one of"),
        (["visiondrop", "--out", "no/where.png"], "does not exist"),
        (["visiondrop", "--out", "kept.txt"], "--out is a .png file"),
        (["var", "--out", "sinks.txt"], "--out is a .png file"),
        (["var", "--out", "a.png", "--json", "./a.png"], "two outputs would go to a.png"),
        (["visiondrop", "--image", "none.png"], "no picture none.png"),
        (["visiondrop", "--image", "TEXT"], "no picture that can be read"),
        (["visiondrop", "--image", "HUGE"], "million pixels"),
        (["visiondrop", "--model", "TEXTMODEL"], "reads no pictures"),
        (["visiondrop", "--answer", "99999"], "positions"),
        (["visiondrop", "--prompt", "w5 <image> w6 <image>"], "cannot put 1 pictures"),
    ],
)
def test_mistakes_are_one_line(
    capsys: Any, folder: Path, tmp_path: Path, monkeypatch: Any, args: list[str], message: str
) -> None:
    from regard.zoo.tiny import tiny

    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXT").write_text("no picture")
    if "HUGE" in args:
        Image.new("1", (20_000, 6_000)).save(tmp_path / "HUGE", format="PNG")
    if "TEXTMODEL" in args:
        tiny("llama").save_pretrained(tmp_path / "TEXTMODEL")
    before = sorted(p.name for p in tmp_path.iterdir())
    given = common(folder)
    for flag, value in zip(args[1::2], args[2::2]):
        flag = {"--answer": "-n"}.get(flag, flag)
        if flag in given:
            given[given.index(flag) + 1] = value
        else:
            given += [flag, value]
    capsys.readouterr()  # saving a model writes a bar
    code, _, err = run(capsys, "run", args[0], *given)
    assert code == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
