"""`regard trial` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regard.cli import main
from regard.lab.trials import frame, vqa
from regard.zoo.tiny import tiny

from ..trials.words import Words
from .command import run

TEXT = " ".join(f"word{n % 89}" for n in range(400))


class Stop(BaseException):
    """The run is cut off."""


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.zoo.load", lambda name, **_: (tiny("llama"), Words()))


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return f"@{path}"


def test_perplexity(capsys: Any, tmp_path: Path, book: str) -> None:
    out = tmp_path / "out.json"
    fixed = ("--text", book, "--context", "60", "--continuation", "4", "--documents", "3")
    code, shown, err = run(
        capsys, "trial", "perplexity", *fixed, "--with", "h2o,recycled-attention:budget=9",
        "--ratio", "0.25,0.5", "--json", str(out),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.read_text())
    keys = ["full", "h2o@0.25", "h2o@0.5", "recycled-attention:budget=9"]
    assert [r["configuration"] for r in found["rows"]] == keys
    assert found["rows"][1]["held"] <= 0.25 and found["rows"][3]["held"] > 1
    assert all(r["texts"] == 3 for r in found["rows"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "out.json"]
    assert "perplexity on smollm2-135m" in shown and "h2o@0.25" in shown.replace("\n", "")
    code, again, _ = run(capsys, "trial", "perplexity", *fixed, "--with", "h2o", "--json", "-")
    said = json.loads(again)
    assert code == 0 and said["texts"]["full"] == found["texts"]["full"]
    assert said["rows"][1]["configuration"] == "h2o@0.25"  # the budget that stands in the help


def test_an_interrupted_run_goes_on(
    capsys: Any, tmp_path: Path, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("trial", "perplexity", "--text", book, "--context", "40", "--continuation", "3",
            "--documents", "2", "--batch-size", "1", "--with", "h2o,snapkv:window=4",
            "--out", str(tmp_path / "out.json"))  # fmt: skip
    made: list[str] = []
    plain = frame._measure

    def measure(*given: Any) -> Any:
        made.append(given[2].key)
        if len(made) == 4:
            raise Stop
        return plain(*given)

    monkeypatch.setattr(frame, "_measure", measure)
    with pytest.raises(Stop):
        main(list(args))
    assert (tmp_path / ".out.json.partial.json").is_file() and len(made) == 4
    code, _, err = run(capsys, *args)
    assert code == 0, err
    assert len(made) == 4 + 3 and not (tmp_path / ".out.json.partial.json").exists()
    first = (tmp_path / "out.json").read_text()
    assert json.loads(first)["rows"][2]["configuration"] == "snapkv:window=4@0.25"


def test_ruler(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, shown, err = run(
        capsys, "trial", "ruler", "--tasks", "single-noise,passage-qa", "--length", "240",
        "--examples", "2", "--with", "snapkv:window=4", "--budget", "50", "--json", str(out),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["low"] == ["single-noise", "passage-qa"] and not found["skipped"]
    assert {r["configuration"] for r in found["rows"]} == {"full", "snapkv:window=4@50 rows"}
    assert {r["task"] for r in found["rows"]} == {"single-noise", "passage-qa"}
    answers = found["texts"]["full"]["passage-qa"]["0"]["answers"]
    assert answers == ["Wiltshire"] and "too hard for the model" in shown
    code, _, _ = run(
        capsys, "trial", "ruler", "--tasks", "single-noise", "--length", "240", "--examples", "1",
        "--with", "h2o", "--skip-low", "--json", str(out),
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert code == 0 and found["skipped"] == ["single-noise"] and list(found["texts"]) == ["full"]


def test_labels(capsys: Any, tmp_path: Path) -> None:
    data, heads, out = (tmp_path / n for n in ("d.jsonl", "heads.json", "out.json"))
    data.write_text("\n".join(json.dumps({"text": f"a {w} day", "label": x}) for w, x in
                              (("good", "fine"), ("bad", "poor"), ("mild", "fine"))))  # fmt: skip
    heads.write_text('{"1": [0, 2]}')
    code, shown, err = run(
        capsys, "trial", "labels", "--task", str(data), "--with", "act+h2o,act:skip_layers=0/0",
        "--heads", str(heads), "--json", str(out),
    )  # fmt: skip
    assert code == 2 and "leaves the first 2" in err  # the tiny model has two layers
    code, shown, err = run(capsys, "trial", "labels", "--task", str(data), "--with",
                           "act:skip_layers=0/0", "--json", str(out))  # fmt: skip
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["settings"]["labels"] == ["fine", "poor"] and "margin" in shown
    row = found["rows"][1]
    assert row["configuration"] == "act:skip_layers=0/0" and row["texts"] == 3
    assert 0 <= row["correct"]["mean"] <= 1 and "difference" in row["margin"]


def test_all_configurations_are_checked_before_the_first_runs(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model, which has two layers, tells that the last one fails."""
    heads = tmp_path / "heads.json"
    heads.write_text('{"1": [0, 2]}')
    line = ("--with", f"act:skip_layers=0/0,act:heads={heads}")
    processor = Words()
    processor.image_processor = object()  # type: ignore[attr-defined]
    monkeypatch.setattr("regard.zoo.load", lambda name, **_: (tiny("llama"), processor))
    monkeypatch.setattr(frame, "_measure", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(vqa, "score", lambda *_, **__: pytest.fail("work was begun"))
    for trial in (("perplexity", "--text", TEXT, "--context", "40", "--documents", "2"), ("vqa",)):
        code, _, err = run(capsys, "trial", *trial, *line)
        assert code == 2 and "leaves the first 2" in err, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["perplexity", "--with", "snapkw"], "Did you mean 'snapkv'"),
        (["perplexity", "--with", "act:beta=3"], "beta"),
        (["perplexity", "--device", "cuda:7"], "CUDA"),
        (["perplexity", "--with", "h2o", "--ratio", "x"], "--ratio takes shares"),
        (["perplexity", "--with", "h2o", "--ratio", "2"], "share of the prompt"),
        (["perplexity", "--with", "h2o", "--ratio", "0.5", "--budget", "3"], "mutually exclusive"),
        (["perplexity", "--text", "@none.txt"], "no file 'none.txt'"),
        (["perplexity", "--text", "a short text"], "give a longer text"),
        (["perplexity", "--context", "many"], "not a length"),
        (["perplexity", "--context", "9k"], "positions"),
        (["perplexity", "--json", "no/where.json"], "does not exist"),
        (["ruler", "--tasks", "multi-kex"], "Did you mean 'multi-key'"),
        (["ruler", "--length", "20"], "greater length"),
        (["labels", "--task", "smell"], "no built-in task"),
        (["labels", "--task", "none.jsonl"], "no file none.jsonl"),
        (["labels", "--heads", "h.json"], "--heads goes with act"),
        (["labels", "--with", "act", "--heads", "h.json"], "no head file"),
        (["labels", "--with", "act", "--heads", "a,b.json"], "rename it"),
    ],
)
def test_mistakes_are_one_line(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frame, "_measure", lambda *_: pytest.fail("work was begun"))
    code, _, err = run(capsys, "trial", *args)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
