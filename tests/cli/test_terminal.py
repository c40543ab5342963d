"""What a text, a name or a transcript would make a terminal do is shown, not done."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from regard import zoo
from regard.errors import plain
from regard.zoo.tiny import tiny

from .command import run
from .test_cli import Words

EVIL = "\x1b[31mred\x1b]0;title\x07 \u202edlrow\u2066 \x9b2J \x7f"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Evil(Words):
    """A tokenizer whose tokens are commands to the terminal."""

    chat_template = None

    def decode(self, ids: Any, **_: Any) -> str:
        return EVIL


@pytest.fixture
def evil(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(zoo, "load", lambda *_, **__: (tiny("llama"), Evil()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["see", EVIL * 9],
        ["run", "h2o", "--prompt", EVIL * 9, "--budget", "4", "-n", "3"],
        ["run", "sink-emergence", "--prompt", EVIL * 9],
        ["see", EVIL, "--model", EVIL],
        ["see", f"@{EVIL}"],
        ["see", "a text", f"--json=missing/{EVIL}"],
        ["run", EVIL],
        ["reproduce", EVIL],
        ["trial", "perplexity", "--with", EVIL],
        ["zoo", "card", EVIL],
        ["bench", "kernels", "--masks", EVIL],
    ],
    ids=lambda words: " ".join(words)[:20].encode("ascii", "replace").decode(),
)
def test_nothing_is_obeyed(words: list[str], evil: Path, capsys: Any) -> None:
    code, out, err = run(capsys, *words)
    assert code in (0, 2)
    assert not OBEYED.search(out + err), repr(OBEYED.search(out + err))


def test_names_of_files_that_are_written(evil: Path, capsys: Any) -> None:
    page = f"{EVIL}.html".replace("/", "")
    code, out, err = run(capsys, "see", "one two three " * 9, f"--html={page}")
    assert code == 0 and (evil / page).is_file()
    assert not OBEYED.search(out + err) and "u202e" in err.replace("\n", "")


def test_json_on_a_terminal_is_ascii(
    evil: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = run(capsys, "see", "one two three " * 9, "--json=-")
    assert code == 0 and out.isascii() and "\\u202e" in out


def test_letters_of_other_scripts_stay() -> None:
    for text in ("नमस्ते", "می\u200cخواهم", "👩\u200d👩\u200d👧", "日本\u3000語", "1\u00a0%"):
        assert plain(text) == text
    assert plain("a\u202eb") == "a\\u202eb"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["see", "x", "--model", "shapes-ds"], "shapes-sd"),
        (["see", "@minuts"], "minutes"),
        (["see", "@northanger-abey"], "northanger-abbey"),
        (["check", "shapes-dti"], "shapes-dit"),
    ],
)
def test_suggestions(words: list[str], meant: str, capsys: Any) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2 and f"Did you mean '{meant}'?" in err


@pytest.mark.parametrize(
    "words", [["models"], ["methods"], ["bench", "plan", "--ranks=8", "--tokens=1M"]]
)
def test_twenty_columns_stay_readable(
    words: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word of the wide output is in the narrow one, but where a long one is cut."""
    said = {}
    for columns in (200, 20):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, said[columns], _ = run(capsys, *words)
        assert code == 0
    assert max(map(len, said[20].splitlines())) <= 20
    narrow = said[20]
    wide = {w for w in re.findall(r"[\w.]+", said[200]) if len(w) <= 14}
    lost = {w for w in wide if w not in narrow}
    assert len(lost) <= 0.05 * len(wide), lost
