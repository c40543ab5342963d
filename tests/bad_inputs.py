"""Bad inputs for every command, derived from its own options: new ones are covered.

One option at a time gets a value that its type, its default or its help says it cannot take; all
others get sensible values. `Attempt.sure` marks values that must be refused before a model loads.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import typer

from regard import catalog
from regard.cli import main
from regard.cli.app import build
from regard.cli.derive import WRITTEN
from regard.cli.see import FOR

LIMIT = 60  # seconds: what takes longer hangs
ROOM = 3 << 30  # bytes that one command may ask for
LOADED = "the stand-in for a model was asked for"
DIGITS = "9" * 5000
ESCAPES = "\x1b[31mred\x1b]0;title\x07\u202eder"
SURROGATE = "caf\udce9"  # what Python makes of bytes that are not UTF-8
NO_NUMBERS = ("nan", "inf", "-inf", "many", "", DIGITS, "1e999", ESCAPES, SURROGATE)
WORDS = ("", "many", "nan", "-1", DIGITS, ESCAPES, SURROGATE, "0-999999999", ",", "{", "@")
# values that make a command quick, and those that it cannot do without
SENSIBLE = {
    "text": "the cat sat on the mat",
    "prompt": "the cat sat on the mat",
    "image": "photo.png",
    "audio": "tone.wav",
    "model": "missing/model",
    "out": "made.json",
    "data": "data",
    "prompts": "prompts.txt",
    "kernel": "kernel.py:attend",
    "ranks": "2",
    "tokens": "16",
    "object": "circle",
    "target": "square",
    "expert": "missing/expert",
}
QUICK = {
    "lengths": "16", "kernels": "naive", "rounds": "1", "repeats": "1", "tokens_per_rank": "16",
    "schemes": "ring", "batch": "2", "minutes": "0.01", "tower_minutes": "0.01", "pool": "0",
    "context": "64",
}  # fmt: skip
OWN = {  # of single commands
    "zoo train": {"name": "shapes-vae", "out": "folder-to-make"},
    "zoo card": {"name": "shapes-sd"},
    "reproduce": {"method": "sink-emergence", "out": "folder-to-make"},
    "bench facts": {"model": "--no-model"},
    "bench masks show": {"masks": "causal"},
    "bench kernels": {"masks": "causal"},
    "train lm": {"size": "nano", "steps": "1", "out": "runs", "data": "novel", "tokens": "9000"},
    "train adapter": {"kind": "sparse-gin", "steps": "1", "data": "novel"},
    "compare": {"runs": "missing/run", "out": "made.html"},
    "train mma": {"model": "shapes-vlm", "steps": "1", "seeds": "1"},
    "trial vqa": {"questions": "1"},
    "trial ruler": {"examples": "1", "tasks": "single-text"},
    "trial lm-eval": {"tasks": "arc_easy"},
    "run dynamic-prompt-learning": {"caption": "a cat", "edit": "cat -> dog"},
    "run swap-anything": {"target": "square"},
    "run steer": {"eta": "0"},
    "run localist": {"docs": "words.txt", "more": "prompts.txt", "toward": "words"},
    "train localist": {"steps": "1", "batch": "2", "length": "12", "width": "16", "data": "topics"},
    "train recruit": {"steps": "1", "texts": "2", "data": "topics"},
    "train grpo": {"steps": "1", "taught": "1", "checked": "1", "generations": "2"},
}
FREE = {"seed": ("-1",), "random_sinks": ("-1",)}  # numbers below 0 that are fine


@dataclass(frozen=True)
class Attempt:
    """One command line with one bad value: `names` are what the message may call it."""

    command: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    value: str
    sure: bool

    def __str__(self) -> str:
        shown = self.value if len(self.value) < 40 else f"{self.value[:10]}... ({len(self.value)})"
        return f"{self.command} {self.names[0]} {shown!r}"


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    code: int
    out: str
    err: str
    left: tuple[str, ...]
    raised: str = ""


def files(folder: Path) -> None:
    """What the values name, in the working folder."""
    from PIL import Image

    from regard.report.contact import png

    (folder / "photo.png").write_bytes(png(Image.new("RGB", (32, 32), "red")))
    (folder / "words.txt").write_text("the cat sat on the mat\n" * 20, "utf-8")
    (folder / "prompts.txt").write_text("a red circle\n", "utf-8")
    (folder / "empty").write_bytes(b"")
    (folder / "folder").mkdir()
    (folder / "data").mkdir()
    (folder / "pickle.bin").write_bytes(pickle.dumps({"weights": [1.0]}))
    (folder / "deep.json").write_text("[" * 100_000 + "]" * 100_000, "utf-8")
    (folder / "kernel.py").write_text("def attend(q, k, v, mask):\n    return v\n", "utf-8")
    for place in (folder, folder / "data"):
        with wave.open(str(place / "tone.wav"), "wb") as sound:
            sound.setparams((1, 2, 16000, 0, "NONE", ""))
            sound.writeframes(bytes(range(256)) * 125)


def commands() -> dict[str, list[Any]]:
    """Every command with its parameters."""
    known: dict[str, list[Any]] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk(below, (*path, name))
        if not hasattr(command, "commands"):
            known[" ".join(path)] = [p for p in command.params if p.name != "help"]

    walk(typer.main.get_command(build()), ())
    return known


def is_output(parameter: Any) -> bool:
    """Whether something is written there."""
    return parameter.metavar in WRITTEN


def kind_of(parameter: Any) -> Any:
    """The type that the command line reads."""
    return parameter.type_descriptor.annotation


def is_folder(parameter: Any) -> bool:
    """Whether a folder is written."""
    return bool(parameter.metavar == "FOLDER")


def values(parameter: Any) -> Iterator[tuple[str, bool]]:
    """Bad values, and whether they must be refused whatever else was given."""
    kind, name = kind_of(parameter), parameter.name
    if kind in (int, float):
        yield from ((v, True) for v in NO_NUMBERS)
        yield from ((v, v not in FREE.get(name, ())) for v in ("-1",) if kind is int)
        yield from ((v, False) for v in ("0", "-0.5", "9" * 30))
        if kind is int:
            yield "1.5", True
    elif is_output(parameter):
        yield from ((v, True) for v in ("words.txt/x", "nul\0byte", "x" * 300))
        if is_folder(parameter):
            yield "words.txt", True
        else:
            yield from ((v, True) for v in ("folder", "missing/folder/x.json", ""))
            yield from ((v, False) for v in (f"{SURROGATE}.json", f"{ESCAPES}.json"))
    elif kind is Path:
        yield from ((v, True) for v in ("missing.file", "nul\0byte", "x" * 300, ESCAPES, SURROGATE))
        yield from ((v, False) for v in ("empty", "pickle.bin", "deep.json", "words.txt", "folder"))
    elif kind is not bool and not getattr(parameter, "is_flag", False):
        numeric = re.fullmatch(r"[\d.]+[km]?([,:][\d.]+[km]?)*", str(parameter.default or ""))
        yield from ((v, bool(numeric)) for v in WORDS)
        yield from ((v, False) for v in ("@missing", "@folder", "@empty", "@pickle.bin"))


def attempts() -> Iterator[Attempt]:
    """All of them."""
    for command, parameters in commands().items():
        for one in parameters:
            known = getattr(one, "rich_help_panel", None) == "Loading" and command != "see"
            for value, sure in list(values(one))[:: 6 if known else 1]:
                yield _attempt(command, parameters, {one.name: value}, one, sure)
        outputs = [p for p in parameters if is_output(p) and not is_folder(p)]
        for one, two in combinations(outputs, 2):
            both = dict.fromkeys((one.name, two.name), "same.png")
            yield _attempt(command, parameters, both, one, True)
        named = {p.name: p for p in parameters}
        for one, two in (("device", "device_map"), ("budget", "ratio")):
            if one in named and two in named:
                both = {one: "cpu" if one == "device" else "8", two: "0.5"}
                yield _attempt(command, parameters, both, named[one], True)


def _attempt(
    command: str, parameters: list[Any], given: dict[str, str], bad: Any, sure: bool
) -> Attempt:
    typed, last = command.split(), []
    own = {"model": SENSIBLE["model"]} | _own(command, bad.name)
    for one in parameters:
        value = given.get(one.name, own.get(one.name, SENSIBLE.get(one.name)))
        if value is None and one.required:
            value = {int: "1", float: "1", Path: "missing.file"}.get(kind_of(one), "word")
        if value is None or not (one.name in given or one.name in own or one.required):
            continue
        if one.param_type_name == "argument":
            last.append(value)
        elif getattr(one, "is_flag", False):
            typed.append(value)
        else:
            option = next((o for o in one.opts if o.startswith("--")), one.opts[0])
            typed.append(f"{option}={value}")
    words = (*typed, "--", *last) if last else tuple(typed)
    names = (*bad.opts, bad.name, bad.name.replace("_", "-"), bad.name.replace("_", " "))
    return Attempt(command, words, names, given[bad.name], sure)


def _own(command: str, name: str) -> dict[str, str]:
    """What this command needs, or is quick with, while a bad value is tried with the one option."""
    first, slug = command.split()[0], command.split()[-1]
    if command == "see":
        kind = "picture" if name == "question" else FOR.get(name, ("text",))[0]
        of = {"sound": {"text": "tone.wav"}, "prompt": {"model": "shapes-sd"}}
        return {"text": "photo.png"} if kind == "picture" else of.get(kind, {})
    own = dict(QUICK if first in ("bench", "train", "zoo") else {}) | OWN.get(command, {})
    if first == "run" and name not in ("budget", "ratio"):
        example = catalog.method(slug).card.example
        own |= {n: str(v) for n, v in example.items() if n in ("budget", "ratio")}
    return own


class Hang(BaseException):
    """A command took longer than `LIMIT`."""


@contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of one command."""
    import resource

    def stop(*_: Any) -> None:
        raise Hang

    before, was = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, was[1]))
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, was)


def tried(words: tuple[str, ...], folder: Path) -> Outcome:
    """Run a command in the folder, as a person would, and clear away what it left."""
    before = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    code, raised, argv = 0, "", sys.argv
    try:
        sys.argv = ["regard", *words]
        with bounded(), redirect_stdout(out), redirect_stderr(err):
            main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Hang:
        raised = f"took longer than {LIMIT} seconds"
    except BaseException as problem:
        raised = f"{type(problem).__name__}: {problem}"
    finally:
        sys.argv = argv
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    left = [p for p in left if p not in before]
    for path in reversed(left):
        (os.rmdir if (folder / path).is_dir() else os.unlink)(folder / path)
    said, told = (s.buffer.getvalue().decode("utf-8", "replace") for s in (out, err))  # type: ignore[attr-defined]
    return Outcome(code, said, told, tuple(left), raised)


def fault(attempt: Attempt, outcome: Outcome) -> str:
    """What is wrong with the outcome; "" where nothing is."""
    text = outcome.err
    if outcome.raised:
        return outcome.raised
    if outcome.code not in (0, 1, 2) or "Traceback" in text:
        return f"exit code {outcome.code}: {text[-300:]}"
    if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text + outcome.out):
        return "control characters reach the terminal"
    if len(text) > 4000:
        return f"a message of {len(text)} characters"
    if attempt.sure and (outcome.code != 2 or LOADED in text):
        return f"taken without a word (exit code {outcome.code})"
    if outcome.code == 0 or LOADED in text or (not attempt.sure and "'missing/model'" in text):
        return ""
    if outcome.left:
        return f"left behind: {outcome.left}"
    flat = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    if len(re.findall(r"^regard: |╭─ Error", text, re.M)) != 1:
        return f"not one message: {text[:300]}"
    nothing = r"empty|after the @|ask something|at least one|no kernel|a folder|(file|picture) \."
    elsewhere = "part of an extra" in flat or "torchrun" in flat  # what this machine lacks
    if elsewhere or (not attempt.value.strip("@,") and re.search(nothing, flat)):
        return ""
    start = repr(attempt.value.removeprefix("@"))[1:-1].replace("\\\\", "\\")[:12] or "''"
    named = (*attempt.names, start, attempt.value, repr(attempt.value))
    if not any(n in flat if len(n) > 1 else f" {n} " in f"{flat} " for n in named):
        return f"does not name the input: {flat[:200]}"
    return ""
