"""The command line: one file a verb."""

from __future__ import annotations

import os
import sys

from regard.errors import RegardError

USER_ERROR = 2


def main(argv: list[str] | None = None) -> None:
    """Run the command line; what the user can put right is one line on stderr and exit code 2."""
    from regard.cli.app import build

    # transformers' own bars and hints would break into ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    given = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        build()(args=given, prog_name="regard", standalone_mode=True)
    except (RegardError, ValueError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("REGARD_DEBUG"):
            raise
        print(f"regard: {_line(error)}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _at_home(word: str) -> str:
    """`--json=~/x.json` with the home folder for `~`, which shells open in words of its own alone.

    >>> _at_home("--json=~/x.json") == f"--json={os.path.expanduser('~')}/x.json"
    True
    """
    option, equals, value = word.partition("=~/")
    if not equals or not option.startswith("--"):
        return word
    return f"{option}={os.path.expanduser('~/')}{value}"


def _line(error: BaseException) -> str:
    """The error in one line, with the file an OSError is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__
