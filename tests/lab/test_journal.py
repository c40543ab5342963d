"""Parts of a run on disk: taken up again, written whole, by one writer at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from regard import files
from regard.errors import InputError
from regard.lab.journal import Journal


def test_parts_are_measured_once(tmp_path: Path) -> None:
    path, measured = tmp_path / "part.json", []

    def get(key: dict[str, Any], value: int) -> Any:
        def make() -> Any:
            measured.append(value)
            return {"v": (value,)}

        with Journal(path, key) as journal:
            return journal.get("x", make)

    assert get({"a": 1}, 1) == {"v": [1]}
    assert get({"a": 1}, 2) == {"v": [1]}
    assert get({"a": 2}, 3) == {"v": [3]}  # other settings
    path.write_text('{"key": {"a": 2}, "par')  # killed while writing by another program
    assert get({"a": 2}, 4) == {"v": [4]}
    assert measured == [1, 3, 4]


def test_the_time_of_earlier_legs_counts(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    with Journal(path, {}) as first:
        first.started -= 100.0  # the parts took this long
        first.get("x", lambda: 1)
    with Journal(path, {}) as second:
        assert second.seconds >= 100.0
    with Journal(path, {"other": 1}) as third:
        assert third.seconds < 100.0


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    with Journal(path, {}) as journal:
        journal.put("x", 1)
        for key in ({}, {"other": 1}):
            with pytest.raises(InputError, match=f"process {os.getpid()}. is writing .*part.json"):
                Journal(path, key)
        code = f"from regard.lab.journal import Journal as J, Path; J(Path({str(path)!r}), {{}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode and "another run (process" in done.stderr
        with Journal(tmp_path / "other.json", {}):
            pass
    with Journal(path, {}) as again:
        assert again.parts == {"x": 1}
        again.clear()
    assert not list(tmp_path.iterdir())


def test_an_error_lets_go_of_the_file(tmp_path: Path) -> None:
    def broken() -> None:
        journal = Journal(tmp_path / "part.json", {})  # nobody closes it
        journal.put("x", 1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    with Journal(tmp_path / "part.json", {}) as journal:
        assert journal.parts == {"x": 1}


@pytest.mark.parametrize("when", ["between", "during"])
def test_a_killed_run_goes_on(tmp_path: Path, when: str) -> None:
    """SIGKILL between two writes, and within one: the file before it is whole."""
    path = tmp_path / "part.json"
    code = f"""
        import os, signal
        from pathlib import Path
        from regard import files
        from regard.lab.journal import Journal
        journal = Journal(Path({str(path)!r}), {{}})
        journal.put("first", 1)
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if {when!r} == "during":
            files.os.replace = kill
            journal.put("second", 2)
        journal.get("second", kill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    with Journal(path, {}) as journal:
        assert journal.parts == {"first": 1}
        assert journal.get("second", lambda: 2) == 2


def test_a_failed_write_leaves_the_parts_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "part.json"
    journal = Journal(path, {})
    journal.put("x", 1)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(files.os, "replace", full)
        journal.put("y", 2)
    journal.close()
    with Journal(path, {}) as again:
        assert again.parts == {"x": 1}


def test_where_there_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "part.json", {})
    assert Journal.beside(None, {}).path is None and Journal.beside(Path("-"), {}).path is None
    with Journal.beside(tmp_path / "out.json", {}) as journal:
        assert journal.path == tmp_path / ".out.json.partial.json"
