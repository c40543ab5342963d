"""`regard run task-kv` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .command import run, stand_in

TEXT = "the cat sat on the mat because it was tired and the day was long " * 6
FEW = ["--ratio", "0.7", "--sinks", "2", "--recent", "5"]


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, layers=3)


def test_both_answers_bytes_and_heads(capsys: Any) -> None:
    code, out, err = run(
        capsys, "run", "task-kv", "--prompt", TEXT, "--question", "who sat there", "--model",
        "llama", *FEW, "-n", "12", "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert said["prompt_tokens"] == 93  # 90 words and the question
    # two key heads of 93 tokens, 16 wide, in float32: keys and values of three layers
    assert said["plain"]["prompt_bytes"] == 2 * 2 * 93 * 16 * 4 * 3
    entries = int(0.7 * 2 * 93)
    assert said["changed"]["prompt_bytes"] == 2 * entries * 16 * 4 * 3
    assert said["bytes_ratio"] == pytest.approx(entries / (2 * 93))
    assert said["speed_ratio"] > 0 and said["plain"]["tokens"] == said["changed"]["tokens"] == 12
    assert [r["layer"] for r in said["report"]["layers"]] == [0, 1, 2]
    for row in said["report"]["layers"]:
        assert len(row["full"]) == 1 and len(row["distances"]) == 2
        kept = row["sinks"] + row["middle"] + row["recent"]
        assert (row["sinks"], row["recent"]) == (2, 5) and kept == entries - 93
    a, b = (said[name]["answer"].split() for name in ("plain", "changed"))
    apart = said["first_difference"]
    if apart is not None:
        at = apart["token"]
        assert a[:at] == b[:at] and (a[at], b[at]) == (apart["plain"], apart["changed"])
    assert said["notes"] == []


def test_what_is_shown(capsys: Any) -> None:
    code, out, err = run(
        capsys, "run", "task-kv", "--prompt", TEXT, "--model", "llama", *FEW, "-n", "4",
        "--words", "60",
    )  # fmt: skip
    assert code == 0, err
    shown = " ".join(out.split())
    assert "The prompt has 60 tokens;" in shown and "keys and values after the prompt" in shown
    assert shown.count("●") == 4, "one full head a layer, and the title"
    assert "tokens/s after the first" in shown and "2 + 17 + 5" in shown


def test_a_ratio_of_one_changes_nothing(capsys: Any) -> None:
    code, out, err = run(
        capsys, "run", "task-kv", "--prompt", TEXT, "--model", "llama", "--ratio", "1", "-n", "6"
    )
    assert code == 0, err
    assert "The answers are the same." in " ".join(out.split())


def test_fewer_full_heads_are_told(capsys: Any) -> None:
    code, _, err = run(
        capsys, "run", "task-kv", "--prompt", TEXT, "--model", "llama", "--ratio", "0.4",
        "--sinks", "2", "--recent", "5", "-n", "2",
    )  # fmt: skip
    assert code == 0 and "holds only 0 whole heads" in " ".join(err.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ratio", "1.2"], "ratio"),
        (["--beta", "0"], "beta"),
        (["--distance", "far"], "distance is one of"),
        (["--json", "no/where.json"], "does not exist"),
        (["--ratio", "0.4"], "raise ratio, or lower sinks and recent"),
        ([*FEW, "-n", "99999"], "positions"),
        (["--prompt", "@nowhere.txt"], "no file"),
    ],
)
def test_mistakes_are_one_line(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "run", "task-kv", "--prompt", TEXT, "--model", "llama", *args)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
