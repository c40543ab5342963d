"""Pictures from files, as an image viewer shows them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.errors import InputError

LARGEST = 100_000_000  # pixels
WHITE = (255, 255, 255)


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds a picture, by what it contains.

    >>> is_picture(__file__)
    False
    """
    image = need_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.open(path).close()
    except (OSError, ValueError, image.DecompressionBombError):
        return False
    return True


def read(path: str | os.PathLike[str]) -> Any:
    """The picture in RGB: turned as its camera was held, transparent parts on white, 16 bits a
    channel scaled to 8, the first frame of several.

    Raises:
        InputError: a missing file, a file that is no picture, or one too large.
        ImportError: pillow is not installed; the message says how to install it.
    """
    image = need_pillow()
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no picture {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image.DecompressionBombWarning)  # ours follows
            opened = image.open(path)
        with opened as picture:
            if picture.width * picture.height > LARGEST:
                raise InputError(
                    f"{path} is {picture.width} x {picture.height}: shrink it below "
                    f"{LARGEST // 1_000_000} million pixels"
                )
            return shown(picture)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{path} is no picture that can be read: {problem}") from problem


def read_all(paths: Sequence[str | os.PathLike[str]]) -> list[Any]:
    """Several pictures, at least one.

    Raises:
        InputError: none, or one that cannot be read.
    """
    if not paths:
        raise InputError("name at least one picture: --image photo.png")
    return [read(path) for path in paths]


def shown(picture: Any) -> Any:
    """An open PIL image as a viewer shows it, in RGB.

    >>> from PIL import Image
    >>> shown(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    >>> shown(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which `convert` would clip at 255
        picture = picture.convert("I").point(lambda v: v / 257).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (*WHITE, 255))
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


def need_pillow() -> Any:
    """The module PIL.Image.

    Raises:
        ImportError: pillow is not installed; the message says how to install it.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('pictures need pillow: pip install "regard[steer]"') from None
    return Image
