"""What every bench shares: a result saved cell by cell, and the machine it was measured on."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.files import write_text

MEASURED = "measured"
NO_MEMORY = "out of memory"
UNSUPPORTED = "unsupported"
NOT_INSTALLED = "not installed"
TIMED_OUT = "timed out"
FAILED = "failed"
OUTCOMES = (MEASURED, NO_MEMORY, UNSUPPORTED, NOT_INSTALLED, TIMED_OUT, FAILED)
# what a later run does not try again
SETTLED = (MEASURED, NO_MEMORY, UNSUPPORTED)
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\:,()]+[/\\])+")


@dataclass
class Cell:
    """One measurement: what was asked (`settings`), how it ended, and the numbers (`values`)."""

    settings: dict[str, Any]
    outcome: str = MEASURED
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"unknown outcome {self.outcome!r}: one of {', '.join(OUTCOMES)}")
        self.reason = without_paths(self.reason)

    @property
    def ok(self) -> bool:
        return self.outcome == MEASURED


@dataclass
class Result:
    """One run of a bench: settings, machine, targets stated before it, and its cells."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    targets: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)

    def get(self, key: str) -> Cell | None:
        """The cell if it was measured, else None.

        >>> Result("x", {}, {}, cells={"a": Cell({}, FAILED, "broke")}).get("a") is None
        True
        """
        cell = self.cells.get(key)
        return cell if cell is not None and cell.ok else None

    def settled(self, key: str) -> bool:
        """Whether a resumed run may pass over this cell."""
        return key in self.cells and self.cells[key].outcome in SETTLED

    def save(self, path: str | Path | None) -> None:
        """Write the JSON whole or not at all; nothing for None."""
        if path is None:
            return
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(Path(path), text)


def load(path: str | Path) -> Result:
    """Read a saved result; InputError for a file that is none."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["cells"] = {key: Cell(**cell) for key, cell in data["cells"].items()}
        return Result(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(
            f"{path} is no bench result ({type(problem).__name__}): name another file, or remove it"
        ) from None


def resume(path: str | Path | None, new: Result) -> Result:
    """The saved result to go on from, or `new` where there is none.

    Numbers are comparable only within one machine and one set of settings: another run in the same
    file is refused, with the first thing that differs. Targets stay as they were first stated.
    """
    if path is None or not Path(path).exists():
        return new
    old = load(path)
    if old.name != new.name:
        raise InputError(f"{path} holds the bench {old.name!r}: choose another file")
    for what, was, now in (
        ("setting", old.settings, new.settings),
        ("environment", old.environment, new.environment),
    ):
        for key in now:
            if was.get(key) != now[key]:
                raise InputError(
                    f"{path} holds another run: {what} {key!r} was {was.get(key)!r} and is now "
                    f"{now[key]!r}. Choose another file, or remove this one"
                )
    return old


def environment(threads: int) -> dict[str, Any]:
    """The machine and the versions that numbers depend on.

    >>> sorted(environment(1))[:3]
    ['cores', 'cpu', 'memory_gib']
    """
    import torch
    import transformers

    from regard import __version__

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "regard": __version__,
    }


def without_paths(text: str) -> str:
    """A message without the folders of its paths: a committed result names no home directory.

    >>> without_paths("no file /home/ann/models/x.json here")
    'no file x.json here'
    """
    return _PATH.sub("", text)


def show_progress(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float]) -> Mapping[str, float]:
    """Median, least and greatest.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    ordered = sorted(values)
    n = len(ordered)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return {"median": median, "low": ordered[0], "high": ordered[-1]}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):
        return None
