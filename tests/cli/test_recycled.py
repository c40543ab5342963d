"""`regard run recycled-attention` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .command import run, stand_in

TEXT = "the cat sat on the mat because it was tired and the day was long " * 4


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, layers=3)


def test_both_answers_and_what_was_read(capsys: Any) -> None:
    code, out, err = run(
        capsys, "run", "recycled-attention", "--prompt", TEXT, "--question", "who sat there",
        "--model", "llama", "--budget", "6", "--stride", "4", "-n", "12", "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert said["prompt_tokens"] == 63 and said["settings"]["query_check"] is None
    # 11 steps, of which the 4th and the 8th read all 67 and 71 keys
    assert said["report"]["entries_per_token"] == (9 * 7 + 67 + 71) / 11
    assert said["report"]["full_entries_per_token"] == sum(range(64, 75)) / 11
    assert [r["full_steps"] for r in said["report"]["layers"]] == [2, 2, 2]
    assert 0 < said["report"]["recovered"] < 1 and all(
        len(r["recovered"]) == 2 for r in said["report"]["layers"]
    )
    assert said["speed_ratio"] > 0 and said["changed"]["end_bytes"] > said["plain"]["end_bytes"]
    a, b = said["plain"]["answer"].split(), said["changed"]["answer"].split()
    assert len(a) == len(b) == 12
    apart = said["first_difference"]
    if apart is None:
        assert a == b
    else:
        at = apart["token"]
        assert a[:at] == b[:at] and (a[at], b[at]) == (apart["plain"], apart["changed"])


def test_what_a_person_sees(capsys: Any) -> None:
    common = ["run", "recycled-attention", "--prompt", TEXT, "--model", "llama", "-n", "9"]
    code, out, err = run(capsys, *common, "--words", "30")
    shown = " ".join(out.split())
    assert code == 0 and "The answers are the same." in shown and "has 30 tokens;" in shown
    assert "Every layer read all keys at 0 of 8 tokens." in shown
    assert "Every key was read: give a smaller --budget" in shown
    code, out, err = run(capsys, *common, "--budget", "5", "--stride", "3")
    shown = " ".join(out.split())
    assert code == 0 and "Every layer read all keys at 2 of 8 tokens." in shown and not err
    assert (
        "Keys read a token: 21 of 64." in shown
        and "the kept keys and the token's own held" in shown
    )
    code, out, err = run(
        capsys, *common, "--budget", "5", "--query-check", "2", "--threshold", "0.3"
    )
    assert code == 0 and not err
    code, out, err = run(capsys, *common, "-n", "1")
    assert code == 0 and "tokens/s" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "0"], "budget"),
        (["--stride", "0"], "stride"),
        (["--stride", "4", "--query-check", "2"], "mutually exclusive"),
        (["--threshold", "0.5"], "--threshold needs --query-check"),
        (["--query-check", "5", "--threshold", "2"], "threshold"),
        (["--pool", "4"], "pool"),
        (["--evict", "all"], "evict"),
        (["--json", "no/where.json"], "does not exist"),
        (["-n", "99999"], "positions"),
    ],
)
def test_mistakes_are_one_line(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["run", "recycled-attention", "--prompt", TEXT, "--model", "llama"]
    code, _, err = run(capsys, *common, *args)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
