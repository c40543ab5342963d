"""What several verbs share: reading text, checking where output goes, loading with a word to the
user.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regard import files
from regard.cards import DIGITS, whole_numbers
from regard.errors import InputError, nearest
from regard.zoo.options import Loading


def read_text(given: str, most: int = -1) -> str:
    """The text itself, the file behind `@path`, the shipped text behind `@name`, or standard input
    for "-"; of a file and of standard input at most so many characters are read.
    """
    if given == "-":
        text = sys.stdin.read(most)
    elif not given.startswith("@"):
        text = given
    else:
        from regard import zoo

        name = given[1:]
        if not name:
            raise InputError("name a file or a shipped text after the @")
        path = Path(name).expanduser()
        if path.is_dir():
            raise InputError(f"{name} is a folder: name a text file in it")
        if path.exists():
            try:
                with path.open(encoding="utf-8-sig") as file:  # a byte order mark is no text
                    text = file.read(most)
            except UnicodeDecodeError:
                raise InputError(
                    f"{name} is not UTF-8 text: convert it, or name a text file"
                ) from None
        elif name in zoo.texts():
            text = zoo.text(name)
        else:
            from regard.zoo.audio import clips

            hint = nearest(name, [*zoo.texts(), *clips()])
            raise InputError(f"there is no file {name!r}, and no shipped text of that name.{hint}")
    if not text.strip():
        raise InputError("the text is empty: give some words, or @file")
    if "\0" in text:
        raise InputError(f"{given[:40]} holds binary data, not text: name a text file")
    return text


MARGIN = 64  # tokens before a cut, which may be others where the text goes on


def first_tokens(tokenizer: Any, text: str, most: int, **how: Any) -> tuple[list[int], int | None]:
    """The first tokens of a text, and how many it has; None where it has more than were asked for,
    and the rest of it was not tokenised: memory follows `most`, not the text.
    """
    taken = 8 * most + 4096
    while True:
        given = tokenizer(text[:taken], return_tensors="pt", verbose=False, **how)
        ids = given.input_ids[0].tolist()
        if taken >= len(text):
            return ids[:most], len(ids)
        if len(ids) >= most + MARGIN:
            return ids[:most], None
        taken *= 4


def check_output(path: Path | None) -> None:
    """Refuse an output path that cannot be written, before any work is done."""
    if path is not None and str(path) != "-":
        files.check_file(path)


def check_file(path: Path | None) -> None:
    """The same for what goes to a file and never to stdout."""
    if str(path) == "-":
        raise InputError("this is written to a file, not to stdout: name one in place of -")
    check_output(path)


def write_json(data: Any, path: Path | None) -> None:
    """JSON to a file (written whole or not at all), or to stdout for "-"; nothing for None."""
    if path is None:
        return
    # a terminal would obey direction characters and the like
    shown = str(path) == "-" and sys.stdout.isatty()
    text = json.dumps(data, ensure_ascii=shown, allow_nan=False, default=os.fspath) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    files.write_text(path, text)


def err() -> Any:
    """A console on stderr, for progress and notes."""
    from regard.report.screen import Console

    return Console(stderr=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something of unknown length runs; silent where no one looks."""
    console = err()
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


def load(name: str | None, loading: Loading | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, with a spinner."""
    with working(f"loading {name}"):
        return (loading or Loading()).load(name)


def numbers(given: str | None, what: str) -> list[int] | None:
    """ "0,3,5-7" as a list of ints."""
    try:
        return None if given is None else list(whole_numbers(given))
    except InputError as problem:
        raise InputError(f"--{what} takes numbers such as 0,3,5-7: {problem}") from None


def count(given: str) -> int:
    """ "4k" or "4096" as an int."""
    text = given.strip().lower()
    factor = {"k": 1024, "m": 1024 * 1024}.get(text[-1:], 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or len(digits) > DIGITS or int(digits) < 1:
        raise InputError(f"{given[:40]!r} is not a length: write 4096 or 4k")
    return int(digits) * factor
