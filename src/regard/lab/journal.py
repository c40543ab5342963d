"""Finished parts of a run, kept on disk so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from regard import files
from regard.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs into one file are not told apart
    fcntl = None  # type: ignore[assignment]


class Journal:
    """The parts of one run by name, written whole after each of them.

    Parts of another run (another model, other settings, other code) are not taken up. While the
    journal is open no other one writes to the same file.

    Args:
        path: the file; in memory alone for None.
        key: what makes it this run, as JSON values.

    >>> with Journal(None, {"model": "tiny"}) as journal:
    ...     journal.get("square", lambda: 3 * 3), journal.get("square", lambda: 0)
    (9, 9)

    Raises:
        InputError: another run writes there, or the folder cannot be written.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.key = path, _plain(key)
        self.parts: dict[str, Any] = {}
        self.spent, self.started = 0.0, time.perf_counter()
        if path is None:
            return
        # an end without `close`, by an exception for example, lets go of the lock as well
        self._release = weakref.finalize(self, _unlock, *_lock(path))
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["key"] == self.key:
                self.parts, self.spent = dict(saved["parts"]), float(saved["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no file, or half of one: measure again

    @classmethod
    def beside(cls, out: Path | None, key: dict[str, Any]) -> Journal:
        """The journal of a result that is written to `out`; in memory alone for None and "-"."""
        if out is None or str(out) == "-":
            return cls(None, key)
        return cls(files.beside(out, ".partial.json"), key)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of this name, measured by `make` unless it is there; plain JSON values only."""
        if name not in self.parts:
            self.put(name, make())
        return self.parts[name]

    def put(self, name: str, part: Any) -> None:
        """Add a part, and save."""
        self.parts[name] = _plain(part)
        self.save()

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier legs included."""
        return self.spent + time.perf_counter() - self.started

    def save(self) -> None:
        """Write the parts, and the time with them: a killed leg is counted up to its last part."""
        if self.path is not None:
            saved = {"key": self.key, "seconds": self.seconds, "parts": self.parts}
            try:
                files.write_text(self.path, json.dumps(saved))
            except (FileNotFoundError, NotADirectoryError, PermissionError) as problem:
                raise InputError(f"{self.path} cannot be written: {problem.strerror}") from None

    def clear(self) -> None:
        """Forget all parts: the result is written."""
        self.parts = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write to the file."""
        if self.path is not None:
            self._release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.parts:
            self.save()  # counts the time since the last part
        self.close()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _lock(path: Path) -> tuple[Path, IO[str]]:
    """The lock file of a path, opened and held; a killed process lets go of it as well."""
    place = files.beside(path.with_name(path.name.removeprefix(".")), ".lock")
    while True:
        try:
            file = place.open("a+", encoding="ascii")
        except OSError as problem:
            raise InputError(f"{path} cannot be written: {problem.strerror}") from None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            writer = file.read().strip()
            file.close()
            raise InputError(
                f"another run (process {writer or 'unknown'}) is writing {path}: wait for it, or "
                "write to another place"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            if os.path.samestat(os.fstat(file.fileno()), place.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder removed it in between
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return place, file


def _unlock(place: Path, file: IO[str]) -> None:
    with suppress(OSError):  # Windows removes no open file
        place.unlink()
    file.close()
