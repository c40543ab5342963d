"""What every bench shares: a result saved cell by cell, its targets, and the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.files import write_text
from regard.lab.fingerprint import fingerprint
from regard.report.document import Section
from regard.report.table import Table
from regard.zoo.options import pick_device as pick_device

MEASURED = "measured"
NO_MEMORY = "out of memory"
UNSUPPORTED = "unsupported"
NOT_INSTALLED = "not installed"
TIMED_OUT = "timed out"
FAILED = "failed"
OUTCOMES = (MEASURED, NO_MEMORY, UNSUPPORTED, NOT_INSTALLED, TIMED_OUT, FAILED)
# what a later run does not try again
SETTLED = (MEASURED, NO_MEMORY, UNSUPPORTED)
NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory")
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
    source: str = ""  # fingerprint of the code that measured; empty in results older than that

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


def resume(path: str | Path | None, new: Result, *modules: str) -> Result:
    """The saved result to go on from, or `new` where there is none.

    Args:
        modules: the code that measures, with all that it imports: a result of other code is
            refused as well.

    Numbers are comparable only within one machine and one set of settings: another run in the same
    file is refused, with the first thing that differs. Targets stay as they were first stated.
    """
    new.source = fingerprint(*modules) if modules else ""
    if path is None or not Path(path).is_file():
        return new
    old = load(path)
    if old.name != new.name:
        raise InputError(f"{path} holds the bench {old.name!r}: choose another file")
    for what, was, now in (
        ("setting", old.settings, new.settings),
        ("environment", old.environment, new.environment),
    ):
        for key in now:
            before = was.get(key, "cpu" if key == "device" else None)  # older results leave it out
            if before != now[key]:
                raise InputError(
                    f"{path} holds another run: {what} {key!r} was {before!r} and is now "
                    f"{now[key]!r}. Choose another file, or remove this one"
                )
    if old.source and old.source != new.source:
        raise InputError(
            f"{path} was measured by other code: choose another file, or remove this one"
        )
    return old


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that numbers depend on.

    >>> sorted(environment(1))[:4]
    ['cores', 'cpu', 'device', 'memory_gib']
    """
    import torch
    import transformers

    from regard import __version__

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": device_name(device),
        "memory_gib": _memory_gib(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "regard": __version__,
    }


def device_name(device: str) -> str:
    """The model of a GPU; "cpu" for anything else.

    >>> device_name("cpu")
    'cpu'
    """
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def outcome_of(problem: BaseException) -> tuple[str, str]:
    """(outcome, reason) of an exception that a measured call raised.

    >>> outcome_of(NotImplementedError("only on Sundays"))
    ('unsupported', 'only on Sundays')
    """
    import torch

    text = " ".join(str(problem).split())[:300] or type(problem).__name__
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in text.lower() for sign in NO_ROOM
    ):
        return NO_MEMORY, f"met: {text}"
    if isinstance(problem, NotImplementedError):
        return UNSUPPORTED, text
    if "No available kernel" in text:
        return UNSUPPORTED, "torch has no such kernel for this call"
    return FAILED, f"{type(problem).__name__}: {text}"


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


def ratios(result: Result, row: str, base: str = "plain") -> list[float]:
    """How many times as long as `base` a row took, round by round; [] where one was not measured.

    >>> a, b = (Cell({}, values={"seconds": s}) for s in ([1.0, 2.0], [1.5, 3.0]))
    >>> ratios(Result("x", {}, {}, cells={"plain": a, "own": b}), "own")
    [1.5, 1.5]
    """
    cells = [result.get(name) for name in (base, row)]
    taken = [[] if cell is None else cell.values.get("seconds", []) for cell in cells]
    return [seconds / plain for plain, seconds in zip(*taken)]


def median(values: list[float]) -> tuple[float, str] | None:
    """The median, and words of it with its range; None for no values.

    >>> median([1.0, 1.2, 1.1])
    (1.1, '1.10 (1.00 to 1.20)')
    """
    if not values:
        return None
    of = spread(values)
    return of["median"], f"{of['median']:.2f} ({of['low']:.2f} to {of['high']:.2f})"


def judged(
    result: Result, measured: Callable[[dict[str, Any]], tuple[float, str] | None]
) -> list[dict[str, str]]:
    """Every target with what was measured, in words, and "met", "missed" or "not measured".

    A target has a rule in words and the limit `most` or `least`; `measured` gives its number and
    the words for it, None where there is none.

    >>> r = Result("x", {}, {}, [{"rule": "short", "most": 2.0}, {"rule": "long", "least": 2.0}])
    >>> [t["verdict"] for t in judged(r, lambda target: (1.0, "1 s"))]
    ['met', 'missed']
    """
    verdicts = []
    for target in result.targets:
        measurement = measured(target)
        value, words = measurement or (math.nan, "-")
        met = target.get("least", -math.inf) <= value <= target.get("most", math.inf)
        verdict = "not measured" if measurement is None else "met" if met else "missed"
        verdicts.append({"rule": target["rule"], "measured": words, "verdict": verdict})
    return verdicts


def targets(verdicts: list[dict[str, str]]) -> Section:
    """The part of a page about targets, from what `judged` says."""
    rows = [[t["rule"], t["measured"] or "-", t["verdict"]] for t in verdicts]
    return Section(
        "Targets, stated before the run", [Table(["target", "measured", "verdict"], rows)]
    )


def ranged(of: Mapping[str, float], digits: int = 2) -> list[str]:
    """A median and its range, as cells.

    >>> ranged({"median": 1.5, "low": 1.0, "high": 2.0})
    ['1.50', '1.00 to 2.00']
    """
    low, middle, high = (f"{of[n]:.{digits}f}" for n in ("low", "median", "high"))
    return [middle, f"{low} to {high}"]


def machine(result: Result) -> str:
    """Where it was measured, for the end of a page."""
    e = result.environment
    return (
        f"Machine: {e.get('cpu')}, {e.get('threads')} of {e.get('cores')} cores, torch "
        f"{e.get('torch')}, transformers {e.get('transformers')}."
    )


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
