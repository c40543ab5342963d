"""Files written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from regard.errors import InputError

LONGEST_NAME = 255  # bytes of a file's name


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then renamed.

    Names that are not UTF-8 may stand in a text: they are escaped, as JSON reads them again.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """The same for bytes. Links are followed; devices and pipes are written to, not replaced."""
    place = real(path)
    part = None if straight(path) else beside(place, f".part{os.getpid()}")
    try:
        if part is None:
            path.write_bytes(data)
            return
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
        if part is not None:
            part.unlink(missing_ok=True)


def beside(path: Path, ending: str) -> Path:
    """A hidden name in the same folder; a long one is cut, and a digest of it put in its place.

    >>> beside(Path("a.json"), ".lock").name
    '.a.json.lock'
    >>> len(beside(Path("x" * 255), ".lock").name)
    255
    """
    name = os.fsencode(path.name)
    room = LONGEST_NAME - len(ending) - 1
    if len(name) > room:
        digest = hashlib.sha256(name).hexdigest()[:16].encode()
        name = name[: room - len(digest)] + digest
    return path.with_name(f".{os.fsdecode(name)}{ending}")


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
    _check_space(path, there)
    return path


def check_outputs(
    files: Mapping[str, Path], folders: Mapping[str, Path], inputs: Iterable[Path] = ()
) -> None:
    """Refuse, before any work is done, what could not be written in the end.

    Args:
        files, folders: where output goes, by the names of the options; "-" is stdout.
        inputs: what is read, and so is not written to.

    >>> check_outputs({"--json": Path("a"), "--html": Path("./a")}, {})
    Traceback (most recent call last):
    ...
    regard.errors.InputError: two outputs would go to a: name another file for --json or --html
    """
    files = {n: p.expanduser() for n, p in files.items() if str(p) != "-"}
    for path in files.values():
        check_file(path)
    for path in folders.values():
        check_folder(path)
    taken = {real(p): "" for p in inputs if p.is_file()}
    for name, path in {**files, **folders}.items():
        if straight(path):
            continue
        other = taken.setdefault(real(path), name)
        if not other:
            raise InputError(f"{name} would replace {path}, which is read: name another file")
        if other != name:
            raise InputError(
                f"two outputs would go to {path}: name another file for {other} or {name}"
            )


def check_file(path: Path) -> None:
    """Refuse an output file that cannot be written; nothing is made yet."""
    folder = real(path).parent
    if straight(path):  # nothing is made beside it
        folder = path
    elif not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist: make it first")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise InputError(f"{path.name[:40]} ... is too long a name: choose a shorter one")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: no permission to write there: choose another place")
    _check_space(path, folder)


def _check_space(path: Path, folder: Path) -> None:
    free = getattr(os, "statvfs", lambda _: None)(folder)
    if free is not None and free.f_blocks and not free.f_bavail:
        raise InputError(f"{path}: the disk is full: make room, or choose another place")
