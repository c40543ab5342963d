"""`regard run act` and `regard calibrate act` as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .command import run, stand_in

TEXT = "the cat sat on the mat because it was tired and the day was long " * 2


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, layers=4)


def test_calibrate_then_run(capsys: Any, tmp_path: Path) -> None:
    data, heads = tmp_path / "train.jsonl", tmp_path / "heads.json"
    lines = [{"text": f"a {w} day", "label": "positive" if n % 2 else "negative"}
             for n, w in enumerate(("good", "bad", "mild", "wild", "warm", "cold"))]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run(
        capsys, "calibrate", "act", "--model", "llama", "--data", str(data), "--out", str(heads),
        "--skip-layers", "2,1", "--threshold", "0.05", "--beta", "0",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(heads.read_text())
    kept = sum(map(len, found["heads"].values()))
    assert f"{kept} of 4 heads kept" in out and 0 < kept < 4
    assert found["model"]["layers"] == 4 and found["settings"]["prompts"] == 6
    assert [f.name for f in tmp_path.glob("heads*")] == ["heads.json"]

    code, out, err = run(
        capsys, "run", "act", "--prompt", TEXT, "--model", "llama", "--heads", str(heads),
        "--threshold", "0.05", "--beta", "0", "-n", "12", "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert said["kl"] > 0 and said["prompt_tokens"] == 30
    layers = said["report"]["layers"]
    assert [r["layer"] for r in layers] == [2] and layers[0]["heads"] == kept
    assert all(s["token"] for s in layers[0]["sinks"])
    a, b = said["plain"]["answer"].split(), said["changed"]["answer"].split()
    assert len(a) == len(b) == 12
    apart = said["first_difference"]
    if apart is None:
        assert a == b
    else:
        at = apart["token"]
        assert a[:at] == b[:at] and (a[at], b[at]) == (apart["plain"], apart["changed"])


def test_neutral_beta_changes_nothing(capsys: Any) -> None:
    code, out, _ = run(
        capsys, "run", "act", "--prompt", TEXT, "--model", "llama", "--beta", "1", "-n", "4"
    )
    assert code == 0 and "The answers are the same. KL" in " ".join(out.split())
    assert "0.0000 nats" in " ".join(out.split())


def test_pooled_tasks(capsys: Any, tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    code, out, err = run(
        capsys, "calibrate", "act", "--model", "llama", "--task", "sentiment,topic", "--samples",
        "4", "--top-k", "1", "--out", str(heads),
    )  # fmt: skip
    assert code == 0, err
    kept = sum(map(len, json.loads(heads.read_text())["heads"].values()))
    assert kept <= 1 and f"{kept} of 4 heads kept" in out
    assert "on 8 prompts" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["run", "act", "--prompt", TEXT, "--alpha", "3", "--threshold", "0.1"],
            "mutually exclusive",
        ),
        (["run", "act", "--prompt", TEXT, "--beta", "3"], "beta"),
        (["run", "act", "--prompt", TEXT, "--heads", "none.json"], "no head file"),
        (["run", "act", "--prompt", TEXT, "-n", "99999"], "positions"),
        (["calibrate", "act", "--out", "h.json", "--task", "smell"], "no built-in task"),
        (["calibrate", "act", "--out", "h.json", "--data", "none.jsonl"], "no file none.jsonl"),
        (["calibrate", "act", "--out", "no/where.json"], "does not exist"),
        (["calibrate", "act", "--out", "h.json", "--skip-layers", "2"], "two numbers"),
        (["calibrate", "act", "--out", "h.json", "--template", "x"], "goes with --data"),
    ],
)
def test_mistakes_are_one_line(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *args, "--model", "llama")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
