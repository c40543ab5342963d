"""A bench result is saved whole, resumed only where comparable, and names no home directory."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from regard.errors import InputError
from regard.lab.bench.record import Cell, Result, load, resume, spread, without_paths


def result(**changes: object) -> Result:
    settings = {"model": "m", "repeats": 3} | changes
    return Result("see", settings, {"cpu": "x"}, cells={"a": Cell({"tokens": 8}, values={"s": 1})})


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result().save(file)
    assert load(file) == result()
    assert [f.name for f in tmp_path.iterdir()] == ["r.json"]  # no part left behind


def test_numbers_json_does_not_know_leave_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result().save(file)
    broken = result()
    broken.cells["b"] = Cell({}, values={"s": float("nan")})
    with pytest.raises(ValueError):
        broken.save(file)
    assert load(file) == result()
    assert len(list(tmp_path.iterdir())) == 1


def test_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert resume(file, result()) == result()  # nothing there yet
    result().save(file)
    assert "a" in resume(file, Result("see", {"model": "m", "repeats": 3}, {"cpu": "x"})).cells
    with pytest.raises(InputError, match="'repeats' was 3 and is now 5"):
        resume(file, result(repeats=5))
    with pytest.raises(InputError, match="'cpu'"):
        resume(file, Result("see", {"model": "m", "repeats": 3}, {"cpu": "y"}))
    with pytest.raises(InputError, match="holds the bench 'see'"):
        resume(file, Result("kernels", {}, {}))


def test_a_result_of_other_code_is_not_taken_up(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    first = resume(file, Result("see", {}, {"device": "cpu"}), "regard.core.state")
    assert len(first.source) == 12
    first.save(file)
    assert resume(file, Result("see", {}, {"device": "cpu"}), "regard.core.state") == first
    with pytest.raises(InputError, match="other code"):
        resume(file, Result("see", {}, {"device": "cpu"}), "regard.core.mask")
    with pytest.raises(InputError, match="'device' was 'cpu' and is now 'a GPU'"):
        resume(file, Result("see", {}, {"device": "a GPU"}), "regard.core.state")
    Result("see", {}, {}).save(file)  # older than both: it stays as it is
    assert resume(file, Result("see", {}, {"device": "cpu"}), "regard.core.state").source == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "see", "cells": 3}'])
def test_a_file_that_is_no_result(text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(InputError, match="is no bench result"):
        load(file)


def test_a_full_disk_is_said_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.json"
    result().save(file)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("regard.files.os.replace", full)
    with pytest.raises(OSError, match="No space left on device") as said:
        result(repeats=4).save(file)
    assert said.value.filename == str(file)
    assert load(file) == result() and len(list(tmp_path.iterdir())) == 1


def test_outcomes() -> None:
    with pytest.raises(ValueError, match="unknown outcome"):
        Cell({}, "fine")
    r = Result("see", {}, {}, cells={"a": Cell({}, "failed"), "b": Cell({}, "out of memory")})
    assert r.get("a") is None and r.get("b") is None
    assert not r.settled("a") and r.settled("b") and not r.settled("c")


def test_reasons_hold_no_folders() -> None:
    said = "no /home/eve/x/model.safetensors, nor C:\\Users\\eve\\y.txt; 3/4 done"
    cell = Cell({}, "failed", said)
    assert "eve" not in cell.reason and "model.safetensors" in cell.reason
    assert "3/4 done" in cell.reason
    assert without_paths("a ratio of 1.5 x") == "a ratio of 1.5 x"
    assert json.dumps(cell.reason)


def test_spread() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "low": 1.0, "high": 4.0}
