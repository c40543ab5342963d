"""A picture is read as a viewer shows it: turned, on white, in 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from regard.errors import InputError
from regard.zoo.pictures import is_picture, read, read_all


def portrait() -> Image.Image:
    upright = Image.new("RGB", (32, 64), "gray")
    ImageDraw.Draw(upright).rectangle([2, 2, 12, 12], fill="red")
    return upright


@pytest.mark.parametrize(
    ("orientation", "stored"), [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)]
)
def test_a_phone_picture_is_turned(tmp_path: Path, orientation: int, stored: object) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    portrait().transpose(stored).save(tmp_path / "my photo.png", exif=tag)
    picture = read(tmp_path / "my photo.png")
    assert picture.size == (32, 64) and picture.getpixel((7, 7)) == (255, 0, 0)


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    values = np.asarray(read(tmp_path / "ramp.png"))[0, :, 0]
    assert abs(values.astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_lie_on_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255) if mode != "LA" else (0, 0, 0, 255))
    clear.convert(mode).save(tmp_path / "clear.png")
    picture = read(tmp_path / "clear.png")
    assert picture.mode == "RGB" and picture.getpixel((3, 3)) == (255, 255, 255)
    assert picture.getpixel((0, 0)) != (255, 255, 255)


def test_a_file_is_what_it_contains(tmp_path: Path) -> None:
    portrait().save(tmp_path / "no-ending", format="PNG")
    (tmp_path / "text.png").write_text("not a picture")
    assert is_picture(tmp_path / "no-ending") and not is_picture(tmp_path / "text.png")
    assert not is_picture(tmp_path) and not is_picture(tmp_path / "missing.png")
    with pytest.raises(InputError, match="is no picture that can be read"):
        read(tmp_path / "text.png")
    with pytest.raises(InputError, match="there is no picture"):
        read_all([tmp_path / "missing.png"])
    with pytest.raises(InputError, match="name at least one picture"):
        read_all([])
