"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from regard.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then renamed."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """The same for bytes. Links are followed; devices and pipes are written to, not replaced."""
    if straight(path):
        path.write_bytes(data)
        return
    place = real(path)
    part = place.with_name(f".{place.name}.part{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive a crash without its contents
        os.replace(part, place)
    except OSError as problem:
        if problem.errno is None:
            raise
        # a full disk names no file, and the part is not the file that was asked for
        raise OSError(problem.errno, problem.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def real(path: Path) -> Path:
    """Where a path leads, links followed; one that leads round in a circle stays as it is."""
    return Path(os.path.realpath(path))


def straight(path: Path) -> bool:
    """Whether something other than a file or a folder lies there: a device, a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_folder(path: Path) -> Path:
    """Refuse an output folder that can be neither made nor written; nothing is made yet."""
    path = path.expanduser()
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        what = "is a file" if there == path else f"cannot be made: {there} is a file"
        raise InputError(f"{path} {what}: name a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"{path}: no permission to write there: choose another folder")
    return path
