"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then renamed."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """The same for bytes."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as problem:
        if problem.errno is None:
            raise
        # a full disk names no file, and the part is not the file that was asked for
        raise OSError(problem.errno, problem.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)
