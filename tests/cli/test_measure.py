"""`regard run` for methods that measure: tokens of a text, or the answer to a prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

import regard
from regard import zoo
from regard.zoo.tiny import tiny

from .command import run
from .test_cli import TEXT, Words


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.loading, "load", lambda name, **_: (tiny("llama"), Words()))
    monkeypatch.setattr(zoo, "load", lambda name, **_: (tiny("llama"), Words()))


def test_sinks_of_a_text(capsys: Any) -> None:
    args = ("run", "sink-emergence", "--prompt", TEXT, "--model", "tiny", "--position", "1")
    code, out, err = run(capsys, *args, "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    ids = Words()(TEXT).input_ids
    assert found["report"]["alpha"] == regard.sinks(tiny("llama"), ids, position=1).alpha.tolist()
    assert found["settings"]["position"] == 1 and found["prompt_tokens"] == ids.shape[1]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "Attention on token 1" in out and "Sink rate" in out


def test_rhythm_of_an_answer(capsys: Any) -> None:
    args = ("run", "preplan-anchor", "--prompt", TEXT, "--model", "tiny", "-n", "24")
    code, out, err = run(capsys, *args, "--horizon", "2,9", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    report = found["report"]
    assert 2 < len(report["waad"]) == len(report["pieces"]) and report["horizon"] == [2, 9]
    assert report["start"] == found["prompt_tokens"]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "global heads" in out and "on token 0 falls" in out


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("sink-emergence", ["--epsilon", "2"], "epsilon is a number above 0"),
        ("sink-emergence", ["--layers", "x"], "--layers: 'x' is no list of whole numbers"),
        ("preplan-anchor", ["--horizon", "9,3"], "0 <= lo <= hi"),
        ("preplan-anchor", ["--horizon", "1,2,3"], "no horizon such as"),
    ],
)
def test_mistakes_are_one_line(capsys: Any, method: str, args: list[str], message: str) -> None:
    code, _, err = run(capsys, "run", method, "--prompt", TEXT, "--model", "tiny", *args)
    assert code == 2 and message in err and err.count("\n") == 1, err
