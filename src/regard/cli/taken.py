"""What a person's word stands for: a text, a sound, a picture, or a prompt for an image."""

from __future__ import annotations

import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path

from regard.errors import InputError

KINDS = {
    "text": "a text",
    "sound": "a sound",
    "picture": "a picture",
    "prompt": "the prompt of an image",
}


@dataclass(frozen=True)
class Taken:
    """One input: its kind, and what to read it from."""

    kind: str
    given: str

    @property
    def note(self) -> str:
        """What it was taken for, where that is not plain from the word itself.

        >>> Taken("text", "@book.txt").note
        ''
        """
        name = Path(self.given).name
        return f"{name} is read as {KINDS[self.kind]}" if self.given[:1] not in "@-" else ""


def taken(given: str, model: str | None) -> Taken:
    """What the word is: an existing file by what it contains (a video or a folder of pictures
    counts as a picture), a shipped clip or text by `@name`,
    `-` for the text on standard input, else a text; a prompt where the model makes images.

    >>> taken("The cat sat.", None), taken("@minutes", None).kind
    (Taken(kind='text', given='The cat sat.'), 'sound')

    Raises:
        InputError: a folder, a file of another kind, or what looks like the name of a file that is
            not there.
    """
    from regard.zoo.pipelines import is_pipeline

    if model is not None and is_pipeline(model):
        return Taken("prompt", given)
    if given == "-":
        return Taken("text", "-")
    named = given.startswith("@")
    if named and _is_clip(given[1:]):
        return Taken("sound", given)
    path = Path(given[1:] if named else given).expanduser()
    if _exists(path):
        if named and not _is_media(path):
            return Taken("text", given)
        return Taken(_content(path), str(path))
    if not named and (kind := _named(given)) is not None:
        raise InputError(f"there is no {kind} {given}: name a file that exists")
    return Taken("text", given)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text, too long for a name
        return False


def _is_clip(name: str) -> bool:
    from regard.zoo.audio import clips

    return name in clips() and not Path(name).exists()


def _is_media(path: Path) -> bool:
    return path.is_file() and _content(path, text=True) != "text"


def _content(path: Path, text: bool = False) -> str:
    """The kind of a file, by what it contains."""
    from regard.zoo import audio, frames, pictures

    if path.is_dir():
        if not text and frames.pictures_in(path):
            return "picture"
        raise InputError(f"{path} is a folder: name a file in it")
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4096)
    if not start:
        raise InputError(f"{path} is an empty file: name another one")
    if frames.is_video(path):
        return "picture"  # its frames
    if audio.sounds(path, start):
        return "sound"
    try:
        if pictures.is_picture(path):
            return "picture"
    except ImportError:
        if (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
            raise
    if text:
        return "text"
    if b"\0" not in start and _decodes(start):
        raise InputError(f"{path} is a text file: write @{path} to read it")
    raise InputError(f"{path} holds no text, picture or sound that can be read: name another file")


def _decodes(start: bytes) -> bool:
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as problem:
        return problem.start > len(start) - 4  # a character that was cut
    return True


def _named(given: str) -> str | None:
    """What the name of a file would be, None for words."""
    if "\n" in given or len(given) > 255:
        return None
    kind = (mimetypes.guess_type(given)[0] or "").partition("/")[0]
    looks = os.sep in given or len(given.split()) <= 4
    return {"image": "picture", "audio": "sound", "video": "video"}.get(kind) if looks else None
