"""`regard see` and `regard run` on pictures of models that tile them, that measure them, and of
folders, animations and videos; a page draws on the user's own picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import regard.cli.pictures
from regard.zoo.tiny_vlm import tiny_processor, tiny_vlm
from tests.families import family

from .command import run

SIZE = (600, 260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that tiles, and a picture."""
    path = tmp_path_factory.mktemp("tiles")
    model, processor = family("idefics3")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    photo(path / "photo.png")
    return path


def photo(path: Path, at: int = 60) -> None:
    picture = Image.new("RGB", SIZE, "navy")
    ImageDraw.Draw(picture).ellipse((at, 50, at + 100, 150), fill="orange")
    picture.save(path)


def test_see_a_tiled_picture(capsys: Any, folder: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "out.html", tmp_path / "out.json"
    ask = ["see", str(folder / "photo.png"), "what is this", "--model", str(folder)]
    code, said, err = run(capsys, *ask, "--html", str(page), "--json", str(data))
    assert code == 0, err
    found = json.loads(data.read_text())
    names = [view["name"] for view in found["views"]]
    assert names == [*(f"tile {r}, {c}" for r in (1, 2) for c in (1, 2, 3, 4)), "whole"]
    assert found["views"][1]["box"] == [0.25, 0.0, 0.5, 0.5]
    assert found["grid"] == [4, 4] and not any("picture" in note for note in found["notes"])
    for word in found["words"]:
        assert len(word["map"]) == 9 * 16
        view, (row, column) = word["view"], word["peak"]
        assert word["map"][16 * view + 4 * row + column] == max(word["map"])
    text = page.read_text()
    assert "tiles: 8 parts of 4 x 4 patches" in text and "whole: 4 x 4 patches" in text
    assert "tile " in " ".join(said.split()) or "whole: " in " ".join(said.split())


@pytest.mark.parametrize("method", [["var", "--dims", "5,9", "--tau", "4"], ["visiondrop"]])
def test_run_draws_tiles_on_the_picture(
    capsys: Any, folder: Path, tmp_path: Path, method: list[str]
) -> None:
    drawn, data = tmp_path / "out.png", tmp_path / "out.json"
    given = ["--model", str(folder), "--image", str(folder / "photo.png"), "-n", "2"]
    cuts = ["--cuts", "1:6/2"] if method == ["visiondrop"] else []
    more = ["--prompt", "what is this", "--out", str(drawn), "--json", str(data)]
    code, _, err = run(capsys, "run", *method, *given, *cuts, *more)
    assert code == 0, err
    found = json.loads(data.read_text())
    assert [v["name"] for v in found["views"]][-1] == "whole" and found["image_tokens"] == [16] * 9
    with Image.open(drawn) as sheet:
        assert sheet.width > 2 * 512 and sheet.height > 2 * 220  # a row of tiles, one of the whole


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_see_with_a_model_that_measures(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """The grid is the processor's, under `generate`; two pictures of a folder, each its own."""
    loaded = family(name)
    monkeypatch.setattr(regard.cli.pictures, "load", lambda *a: loaded)
    photo(tmp_path / "photo.png")
    page = tmp_path / "out.html"
    ask = ["--model", name, "--html", str(page), "--json", "-"]
    code, said, err = run(capsys, "see", str(tmp_path / "photo.png"), "what is this", *ask)
    assert code == 0, err
    found = json.loads(said)
    assert found["grid"] == [5, 12] and "5 x 12 patches" in page.read_text()
    assert all(len(word["map"]) == 60 for word in found["words"])
    other = Image.new("RGB", (200, 400), "green")
    other.save(tmp_path / "zebra.png")
    _, rows, columns = loaded[1].image_processor(other)["image_grid_thw"][0]
    code, said, err = run(capsys, "see", str(tmp_path), "what is this", *ask)
    assert code == 0, err
    found = json.loads(said)
    assert found["pictures"] == ["photo.png", "zebra.png"]
    assert [(v["picture"], v["rows"], v["columns"]) for v in found["views"]] == [
        (0, 5, 12), (1, rows // 2, columns // 2),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["var", "visiondrop"])
def test_run_with_a_model_that_measures(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    loaded = family("qwen2_vl")
    monkeypatch.setattr(regard.cli.pictures, "load", lambda *a: loaded)
    photo(tmp_path / "photo.png")
    given = {"var": ["--dims", "5,9", "--tau", "4"], "visiondrop": ["--cuts", "1:10/4"]}[method]
    more = ["--image", str(tmp_path / "photo.png"), "--model", "qwen2_vl", "-n", "2"]
    asked = ["--prompt", "what is this", "--out", str(tmp_path / "out.png"), "--json", "-"]
    code, said, err = run(capsys, "run", method, *given, *more, *asked)
    assert code == 0, err
    found = json.loads(said)
    grid = found["report"]["grid"] if method == "var" else found["report"]["images"][0]["grid"]
    assert grid == [5, 12] == found["grids"][0]
    assert (tmp_path / "out.png").is_file()


def test_a_family_without_a_known_layout_has_shares_and_no_map(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, processor = family("idefics3")
    model.config.model_type = "of tomorrow"
    monkeypatch.setattr(regard.cli.pictures, "load", lambda *a: (model, processor))
    photo(tmp_path / "photo.png")
    page, data = tmp_path / "out.html", tmp_path / "out.json"
    ask = ["see", str(tmp_path / "photo.png"), "what is this", "--model", "x"]
    code, said, err = run(capsys, *ask, "--html", str(page), "--json", str(data))
    assert code == 0 and "patches out is not known" in " ".join(err.split())
    assert "share on the picture" in said and "looks most at" not in said
    found = json.loads(data.read_text())
    assert found["grid"] is None and found["views"] == [] and "peak" not in found["words"][0]
    assert "patches out is not known" in page.read_text()


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("square")
    tiny_vlm("llava").save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


def test_frames_of_an_animation(capsys: Any, square: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 40), (25 * n, 0, 0)) for n in range(10)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=50)
    page = tmp_path / "out.html"
    ask = ["see", str(tmp_path / "clip.gif"), "w5 w6", "--model", str(square), "--json", "-"]
    code, said, err = run(capsys, *ask, "--html", str(page))
    assert code == 0, err
    found = json.loads(said)
    assert "clip.gif: 8 of 10 frames" in found["notes"]
    assert found["pictures"][:2] == ["clip.gif, frame 1", "clip.gif, frame 2"]
    assert found["pictures"][-1] == "clip.gif, frame 10" and len(found["views"]) == 8
    assert [view["picture"] for view in found["views"]] == list(range(8))
    left, top, right, bottom = found["views"][0]["box"]  # the middle, which is cropped
    assert (
        (top, bottom) == (0, 1)
        and 0.15 < left < 0.25
        and right == pytest.approx(1 - left, abs=0.05)
    )
    assert "clip.gif, frame 10" in page.read_text()


def test_a_video_names_the_package_that_reads_it(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, square: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    ask = ["see", str(tmp_path / "clip.mp4"), "w5", "--model", str(square)]
    code, _, err = run(capsys, *ask)
    assert code == 2 and 'pip install "regard[video]"' in " ".join(err.split())


def test_frames_of_a_video(capsys: Any, square: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is part of the extra 'video'")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (25 * n, 0, 0)))
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    ask = ["see", str(tmp_path / "clip.mp4"), "w5 w6", "--model", str(square), "--json", "-"]
    code, said, err = run(capsys, *ask)
    assert code == 0, err
    assert "clip.mp4: 8 of 10 frames" in json.loads(said)["notes"]
    assert json.loads(said)["pictures"][-1] == "clip.mp4, frame 10"
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    code, _, err = run(capsys, "see", str(tmp_path / "broken.mp4"), *ask[2:])
    assert code == 2 and "no video that can be read" in " ".join(err.split())
