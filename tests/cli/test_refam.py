"""regard run refam: a mask, a page and numbers for an image and for clips; errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.command import run

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.zoo.tiny_diffusion import tiny_pipeline

TEXT = "the red circle on the left"
RUN = ("run", "refam")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sd3")
    tiny_pipeline("sd3").save_pretrained(path)
    return str(path)


def picture(n: int = 0) -> Image.Image:
    import torch

    g = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 255, (32, 32, 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_an_image(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, mask, data = tmp_path / "scene.png", tmp_path / "mask.png", tmp_path / "out.json"
    page = tmp_path / "page.html"
    picture().save(scene)
    args = ("--image", str(scene), "--model", model, "--parser", "rules")
    more = ("--mask", str(mask), "--html", str(page), "--json", str(data))
    code, text, err = run(capsys, *RUN, TEXT, *args, *more)
    assert code == 0, err
    made = json.loads(data.read_text())
    assert made["content"] == ["red", "circle"] and made["settings"]["magnets"][0] == "with"
    inside = Image.open(mask)
    x, y = made["frames"][0]["point"]
    assert inside.size == (32, 32) and inside.getpixel((x, y)) == 255
    assert f"column {x}, row {y}" in text
    html = page.read_text()
    assert html.count("<img") == 3 + len(TEXT.split()) + 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    bare = tmp_path / "bare.json"
    assert run(capsys, *RUN, TEXT, *args, "--magnets", "", "--json", str(bare))[0] == 0
    assert json.loads(bare.read_text())["settings"]["magnets"] == []


def test_clips_frame_by_frame(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [picture(n) for n in range(3)]
    folder, clip = tmp_path / "frames", tmp_path / "clip.png"
    folder.mkdir()
    for n, frame in enumerate(frames):
        frame.save(folder / f"{n}.png")
    frames[0].save(clip, save_all=True, append_images=frames[1:])
    found = []
    for source in (folder, clip):
        data, mask = tmp_path / "out.json", tmp_path / "mask.gif"
        code, _, err = run(
            capsys, *RUN, TEXT, "--image", str(source), "--model", model, "--parser", "rules",
            "--mask", str(mask), "--json", str(data),
        )  # fmt: skip
        assert code == 0, err
        found.append([f["point"] for f in json.loads(data.read_text())["frames"]])
    assert len(found[0]) == 3 and found[0] == found[1]
    alone = tmp_path / "alone.json"
    run(capsys, *RUN, TEXT, "--image", str(folder / "2.png"), "--model", model, "--parser", "rules",
        "--json", str(alone))  # fmt: skip
    assert json.loads(alone.read_text())["frames"][0]["point"] == found[0][2]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("of the", (), "no content words"),
        (TEXT, ("--image", "none.png"), "there is no image"),
        (TEXT, ("--gas", "x"), "gas is"),
        (TEXT, ("--segmenter", "x"), "segmenter is"),
        (TEXT, ("--mask", "mask.jpg"), "--mask is a .png"),
    ],
)
def test_errors_in_one_line(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    scene = tmp_path / "scene.png"
    picture().save(scene)
    code, _, err = run(
        capsys, *RUN, text, "--image", str(scene), "--model", model, "--parser", "rules", *more
    )
    assert code == 2 and message in err and "Traceback" not in err
