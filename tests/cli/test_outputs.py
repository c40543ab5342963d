"""Every output of every command is checked in one place, before any work."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from regard import files, zoo
from regard.cli.derive import WRITTEN
from regard.errors import InputError
from regard.zoo import Loading
from regard.zoo.tiny import tiny

from ..bad_inputs import SURROGATE, commands, is_folder, is_output, kind_of
from .command import run
from .test_cli import TEXT, Words


def test_every_path_that_is_written_says_so() -> None:
    """A new output without its metavar would not be checked: inputs are the ones known here."""
    read = {
        "--image", "--heads", "--negatives", "--concept", "--mask", "--include", "--data",
        "--prompts", "--peer-python", "--rules", "--metadata", "--vae", "--tower", "--start",
    }  # fmt: skip
    for command, parameters in commands().items():
        for one in parameters:
            if kind_of(one) is Path:
                assert is_output(one) or one.opts[-1] in read, (command, one.opts)
                assert one.opts[0] not in ("--json", "--html", "--out", "--page") or is_output(one)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No command gets as far as a model."""

    def load(*_: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(Loading, "load", load)
    monkeypatch.setattr(Loading, "pipeline", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_outputs_to_one_file_are_refused(asked: Path, capsys: Any) -> None:
    (asked / "link").symlink_to("same.png")
    pairs = 0
    for command, parameters in commands().items():
        outputs = [p for p in parameters if is_output(p) and not is_folder(p)]
        needed = [p for p in parameters if p.required and p not in outputs]
        words = [f"{p.opts[-1]}=1" for p in needed if p.param_type_name == "option"]
        last = ["1" for p in needed if p.param_type_name == "argument"]
        for one, two in combinations(outputs, 2):
            given = [f"{one.opts[-1]}=same.png", f"{two.opts[-1]}=link", *words, *last]
            code, _, err = run(capsys, *command.split(), *given)
            assert code == 2 and "two outputs would go to" in err, (command, err)
            pairs += 1
    assert pairs >= 15 and os.listdir(asked) == ["link"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("folder", "is a folder"),
        ("missing/x.json", "does not exist"),
        ("file/x.json", "does not exist"),
        ("x" * 256, "too long"),
        ("locked/x.json", "no permission"),
        ("read-only.json", "no permission"),
        ("book.txt", "which is read"),
    ],
)
def test_places_that_cannot_be_written(
    place: str, said: str, asked: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asked / "folder").mkdir()
    (asked / "locked").mkdir()
    for name in ("file", "read-only.json", "book.txt"):
        (asked / name).write_text("words", "utf-8")
    closed = {"locked", "read-only.json"}  # root may write anywhere
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda p, m: (m != os.W_OK or Path(p).name not in closed) and access(p, m)
    )
    plan = ["bench", "plan", "--ranks=1", "--tokens=1"]
    h2o = ["run", "h2o", "--prompt=@book.txt", "--ratio=0.5"]
    for command in (["see", "@book.txt"], ["check", "x"], plan, h2o):
        if said != "which is read" or "@book.txt" in " ".join(command):
            code, _, err = run(capsys, *command, f"--json={place}")
            assert code == 2 and said in err and place[:40] in err, (command, err)
    assert (asked / "book.txt").read_text("utf-8") == "words"


def test_a_full_disk_is_named(asked: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 1, 1, 1, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: full)
        code, _, err = run(capsys, "see", "a text", "--json=a.json")
    assert code == 2 and "a.json: the disk is full" in err
    if os.path.exists("/dev/full"):  # found out only when it is written
        with pytest.raises(OSError) as problem:
            files.write_text(Path("/dev/full"), "words")
        assert problem.value.filename == "/dev/full" and "No space" in str(problem.value)


@pytest.mark.parametrize("name", ["x" * 246, "y" * 255, f"{SURROGATE}", "caf\u00e9" * 51])
def test_long_and_odd_names_are_written(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "load", lambda *_, **__: (tiny("llama"), Words()))
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "see", TEXT, "--facts=entropy", f"--json={name}")
    assert code == 0, err
    assert json.loads((tmp_path / name).read_text("utf-8"))["meta"]["num_tokens"] == 60
    assert len(os.listdir(tmp_path)) == 1
    from regard.lab.journal import Journal

    with Journal.beside(tmp_path / name, {}) as journal:
        journal.put("a", 1)
    with Journal.beside(tmp_path / name, {}) as journal:
        assert journal.get("a", lambda: 2) == 1
        journal.clear()
    assert len(os.listdir(tmp_path)) == 1


def test_what_is_written_is_one_of_three_kinds() -> None:
    assert WRITTEN == ("FILE", "FILE|-", "FOLDER")
    with pytest.raises(InputError, match="two outputs would go to"):
        files.check_outputs({"--a": Path("x")}, {"--b": Path("x")})
