"""The command line: commands of regard, and those that methods bring.

Exit codes: 0 done, 1 a check that failed, 2 an input that cannot be used, 70 a fault of regard's
own, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys

from regard.errors import RegardError, plain

USER_ERROR, OWN_FAULT, INTERRUPTED = 2, 70, 130
USERS = (
    RegardError, ValueError, OSError, ImportError, MemoryError, OverflowError, RecursionError,
)  # fmt: skip
LONGEST = 600  # characters of a message: some libraries quote the whole input
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; what the user can put right is one line on stderr and exit code 2."""
    # transformers' own bars and hints would break into ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    given = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        from regard.cli.app import build

        build(given)(args=given, prog_name="regard", standalone_mode=True)
    except BrokenPipeError:  # whoever reads has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
    except KeyboardInterrupt:
        print("regard: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("REGARD_DEBUG"):
            raise
        code = _code(error)
        print(f"regard: {_line(error, code)}", file=sys.stderr)
        sys.exit(code)


def _code(error: Exception) -> int:
    """Whether the user can put it right."""
    module = type(error).__module__.partition(".")[0]
    user = (
        isinstance(error, USERS)
        or module in ("jinja2", "safetensors", "yaml", "huggingface_hub")
        or any(words in str(error).lower() for words in _MEMORY)
    )
    return USER_ERROR if user else OWN_FAULT


def _line(error: BaseException, code: int) -> str:
    """The error in one line, with the file an OSError is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{_short(plain(str(error.filename)))}: {error.strerror}"
    text = _short(plain(" ".join(str(error).split()))) or type(error).__name__
    if code != OWN_FAULT:
        return text
    from regard import __version__

    return (
        f"{type(error).__name__}: {text}. This is a fault of regard {__version__}, not of the "
        "input: run the command again with REGARD_DEBUG=1 and report what it prints"
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _at_home(word: str) -> str:
    """`--json=~/x.json` with the home folder for `~`, which shells open in words of its own alone.

    >>> _at_home("--json=~/x.json") == f"--json={os.path.expanduser('~')}/x.json"
    True
    """
    option, equals, value = word.partition("=~/")
    if not equals or not option.startswith("--"):
        return word
    return f"{option}={os.path.expanduser('~/')}{value}"
