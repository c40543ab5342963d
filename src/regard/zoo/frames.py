"""The pictures behind one name: a picture, a folder of them, or the frames of a video.

A video is shown to a model as pictures, evenly spaced over its length.
"""

from __future__ import annotations

import mimetypes
import re
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.zoo.pictures import is_picture, need_pillow, read, shown

MOST = 8  # frames of one video or folder


def read_frames(path: str | Path, most: int = MOST) -> tuple[list[tuple[str, Any]], str]:
    """Names and pictures, and a note on what was left out, "" where nothing was.

    Raises:
        InputError: nothing that can be read.
        ImportError: a package is not installed; the message says how to install it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = pictures_in(path)
        if not files:
            raise InputError(f"{path} is a folder without pictures: name a file in it")
        chosen = spaced(len(files), most)
        pictures = [(files[n].name, read(files[n])) for n in chosen]
        return pictures, _note(path, chosen, len(files), "pictures")
    if is_video(path):
        chosen, count, images = _decoded(path, most)
    elif (count := _count(path)) > 1:
        chosen = spaced(count, most)
        images = [_frame(path, n) for n in chosen]
    else:
        return [(path.name, read(path))], ""
    pictures = [(f"{path.name}, frame {n + 1}", image) for n, image in zip(chosen, images)]
    return pictures, _note(path, chosen, count, "frames")


def spaced(count: int, most: int) -> list[int]:
    """At most so many numbers below count, evenly spaced, with the first and the last.

    >>> spaced(3, 8), spaced(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    if count <= most:
        return list(range(count))
    return [round(n * (count - 1) / (most - 1)) for n in range(most)]


def is_video(path: Path) -> bool:
    """Whether a file is named like a video."""
    return (mimetypes.guess_type(path.name)[0] or "").startswith("video/")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; numbers in names count as numbers."""

    def order(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]

    files = (f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    return sorted((f for f in files if is_picture(f)), key=order)


def _note(path: Path, chosen: list[int], count: int, what: str) -> str:
    return f"{path.name}: {len(chosen)} of {count} {what}" if len(chosen) < count else ""


def _count(path: Path) -> int:
    try:
        with need_pillow().open(path) as picture:
            # cameras put previews behind a JPEG, which are no frames
            return int(picture.n_frames) if picture.format in ("GIF", "PNG", "WEBP") else 1
    except (OSError, ValueError, AttributeError):
        return 1  # `read` says why it cannot be read


def _frame(path: Path, number: int) -> Any:
    with need_pillow().open(path) as picture:
        picture.seek(number)
        return shown(picture)


def _decoded(path: Path, most: int) -> tuple[list[int], int, list[Any]]:
    """Frames of a video file: (their numbers, how many there are, pictures)."""
    try:
        import av
    except ImportError:
        raise ImportError('videos need PyAV: pip install "regard[video]"') from None
    try:
        with av.open(str(path)) as video:
            count = sum(1 for _ in video.decode(video=0))
        chosen = spaced(count, most)
        images = []
        with av.open(str(path)) as video:
            for n, frame in enumerate(video.decode(video=0)):
                if n in chosen:
                    images.append(frame.to_image())
    except (av.error.FFmpegError, IndexError) as problem:
        raise InputError(f"{path} is no video that can be read: {problem}") from problem
    if not images:
        raise InputError(f"{path} holds no frame: name another video")
    return chosen, count, images
