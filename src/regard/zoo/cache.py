"""The user's cache: what is costly to make is made once, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard.errors import InputError

MARKER = "made.json"
_STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Return the folder for what regard makes once: REGARD_CACHE, or the platform's cache folder.

    The folder is not created by asking for it.
    """
    asked = os.environ.get("REGARD_CACHE")
    if asked:
        return Path(asked).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "regard"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "regard"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG rules ask to ignore relative paths.
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "regard"


def made_path(name: str) -> Path | None:
    """Return the folder that `make_once` completed under this name, or None."""
    folder = cache_dir() / name
    return folder if (folder / MARKER).is_file() else None


def make_once(
    name: str, make: Callable[[Path], None], *, facts: dict[str, Any], free_bytes: int = 0
) -> Path:
    """Return the cache folder `name`, calling `make(folder)` to fill it if it is not there yet.

    `make` fills a temporary folder beside the target, which is then renamed: other processes see a
    whole folder or none. Of several processes that ask at once, one makes and the others wait; if
    locking does not work there, each makes its own and the first to finish wins. `facts` go into
    the marker file. Raises InputError if the cache cannot be written or has too little room.
    """
    target = cache_dir() / name
    if (target / MARKER).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        free = shutil.disk_usage(target.parent).free
        if free < free_bytes:
            raise InputError(
                f"The cache {target.parent} needs {free_bytes / 1e6:.0f} MB free but has "
                f"{free / 1e6:.0f} MB; make room or set REGARD_CACHE to another folder."
            )
        with _Lock(target.with_name(f".{target.name}.lock")):
            if not (target / MARKER).is_file():
                _make(target, make, facts)
    except OSError as problem:
        if problem.errno is None:  # not the system's: what `make` raised about its own input
            raise
        raise InputError(
            f"Cannot write the cache {target.parent}: {problem.strerror or problem}. "
            "Set REGARD_CACHE to a folder you may write to."
        ) from problem
    return target


def _make(target: Path, make: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Fill a temporary folder and rename it to the target; leave nothing behind on failure."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        make(temporary)
        (temporary / MARKER).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            temporary.rename(target)
        except OSError:
            if (target / MARKER).is_file():
                return  # another process was first, and its folder is as good as ours
            if not target.is_dir():
                raise
            # A folder without the marker was left by something else: replace it.
            shutil.rmtree(target)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove temporary folders that killed processes left behind more than a day ago."""
    for leftover in target.parent.glob(f".{target.name}.*"):
        try:
            if leftover.is_dir() and time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:
            pass  # another process tidied up at the same moment


class _Lock:
    """Wait for the other processes that make the same thing; go on without where that fails.

    The rename alone keeps the result whole. The lock only saves the waste of making it twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def __enter__(self) -> _Lock:
        try:
            import fcntl
        except ImportError:  # Windows
            return self
        self._file = open(self._path, "a")
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()  # closing releases the lock


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
