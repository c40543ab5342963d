"""The command line as a person meets it: answers, files, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import regard
from regard import zoo
from regard.cli.common import read_text
from regard.core import FACTS
from regard.zoo.tiny import tiny

from .command import run


class Words:
    """A tokenizer of one token a word, enough for the command line."""

    def __call__(self, text: str, **_: Any) -> Any:
        import torch

        ids = [3 + sum(map(ord, w)) % 100 for w in text.split()]
        return type("Batch", (), {"input_ids": torch.tensor([ids])})

    def decode(self, ids: list[int]) -> str:
        return f"<w{ids[0]}> "


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model tiny:FAMILY` gives a tiny random model; any other name goes the usual way."""
    real = zoo.load

    def load(name: str, **kwargs: Any) -> Any:
        if name.startswith("tiny:"):
            return tiny(name[5:]), Words()
        return real(name, **kwargs)

    monkeypatch.setattr(zoo, "load", load)


TEXT = "the cat sat on the mat because it was tired and the day was long " * 4


def test_see_writes_page_and_json(capsys: Any, tmp_path: Path) -> None:
    page, data = tmp_path / "a.html", tmp_path / "a.json"
    code, out, err = run(
        capsys, "see", TEXT, "--model", "tiny:llama", "--html", str(page), "--json", str(data)
    )
    assert code == 0 and str(page) in err.replace("\n", "")
    assert "attention" in out
    found = json.loads(data.read_text())
    assert found["meta"]["num_tokens"] == 60 and found["sinks"]["alpha"]
    assert "<w" not in page.read_text().split("<script")[0]  # what the user gave is escaped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_see_as_a_filter(capsys: Any) -> None:
    code, out, _ = run(capsys, "see", TEXT, "--model", "tiny:llama", "--json", "-")
    assert code == 0 and json.loads(out)["meta"]["model"] == "tiny:llama"


def test_see_cuts_and_says_so(capsys: Any, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    args = ("see", f"@{book}", "--model", "tiny:llama", "--max-tokens", "20")
    code, out, _ = run(capsys, *args)
    assert code == 0 and "60 tokens; only the first 20" in " ".join(out.split())
    code, _, err = run(capsys, *args, "--json", "-")
    assert code == 0 and "60 tokens; only the first 20" in " ".join(err.split())


def test_layers_and_heads(capsys: Any) -> None:
    args = ("--model", "tiny:llama", "--layers", "1", "--heads", "0,2-3", "--json", "-")
    code, out, _ = run(capsys, "see", TEXT, *args)
    found = json.loads(out)
    assert code == 0 and found["sinks"]["layers"] == [1] and len(found["sinks"]["alpha"][0]) == 3


WRONG = {
    "empty text": (["see", "  "], "text is empty"),
    "one token": (["see", "word", "--model", "tiny:llama"], "at least two tokens"),
    "no file": (["see", "@nope.txt"], "no file 'nope.txt'"),
    "near a shipped text": (["see", "@northanger-abey"], "Did you mean 'northanger-abbey'"),
    "a folder": (["see", "@."], "is a folder"),
    "not text": (["see", "@binary.bin"], "not UTF-8 text"),
    "unknown model": (
        ["see", "some words", "--model", "smolm2-135m"],
        "Did you mean 'smollm2-135m'",
    ),
    "no such folder": (["see", "some words", "--html", "nowhere/a.html"], "does not exist"),
    "a folder as page": (["see", "some words", "--html", "."], "is a folder"),
    "layer": (["see", TEXT, "--model", "tiny:llama", "--layers", "9"], "layer 9 is out of range"),
    "head": (["see", TEXT, "--model", "tiny:llama", "--heads", "9"], "head 9 is out of range"),
    "a fact": (["see", TEXT, "--model", "tiny:llama", "--facts", "entrpy"], "mean 'entropy'"),
    "the matrix": (["see", TEXT, "--model", "tiny:llama", "--facts", "map"], "GiB at 16k"),
    "head syntax": (
        ["see", TEXT, "--model", "tiny:llama", "--heads", "x"],
        "--heads takes numbers",
    ),
    "length syntax": (["see", TEXT, "--max-tokens", "0"], "is not a length"),
    "a vision model": (["see", TEXT, "--model", "tiny:vit"], "reads pixel_values, not text"),
    "unknown verb": (["methods", "sea"], "Did you mean 'see'"),
    "unknown method": (["reproduce", "sink-emergance"], "Did you mean 'sink-emergence'"),
    "method to come": (["reproduce", "mosaic"], "cannot be reproduced yet"),
    "bench lengths": (["bench", "see", "--lengths", "1k,two"], "is not a length"),
    "bench act tokens": (["bench", "act", "--tokens", "x"], "is not a length"),
    "bench act to stdout": (["bench", "act", "--out", "-"], "name one in place of -"),
    "a page to stdout": (["see", TEXT, "--html", "-"], "name one in place of -"),
    "train device": (["train", "mma", "--device", "mps"], "unknown device 'mps'"),
    "train to stdout": (["train", "mma", "--out", "-"], "name one in place of -"),
    "calibrate least": (
        ["calibrate", "act", "--out", "heads.json", "--least", "nan"],
        "--least is a finite number",
    ),
    "a superscript": (["see", TEXT, "--model", "tiny:llama", "--layers", "²"], "takes numbers"),
    "layers backwards": (["see", TEXT, "--layers", "5-3"], "--layers takes numbers"),
    "heads backwards": (["see", TEXT, "--heads", "5-3"], "--heads takes numbers"),
    "nothing behind the @": (["see", "@"], "after the @"),
    "a single token": (
        ["see", TEXT, "--model", "tiny:llama", "--max-tokens", "1"],
        "raise --max-tokens",
    ),
    "one file for two": (
        ["see", TEXT, "--html", "a.html", "--json", "./a.html"],
        "two outputs would go to a.html",
    ),
    "a short check": (["check", "tiny:llama", "--tokens", "2"], "at least 3 tokens, not 2"),
    "bench decode context": (["bench", "decode", "--context", "10"], "at least 16 tokens"),
    "bench speech model": (["bench", "speech", "--model", "tiny:llama"], "no cross attention"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_get_one_line(
    case: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    args, message = WRONG[case]
    code, out, err = run(capsys, *args)
    assert code == 2, (code, out, err)
    assert message in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary.bin"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhello there")
    assert read_text(f"@{file}") == "hello there"


def test_samples_with_odd_line_ends_are_gone_on_with(tmp_path: Path) -> None:
    from regard.steer.steer.kept import KeptSamples

    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    kept = KeptSamples(tmp_path / "samples.jsonl", {"batch": 1, "count": 2})
    for row in rows:
        kept.add(row)
    assert KeptSamples(tmp_path / "samples.jsonl", {"batch": 1, "count": 2}).rows == rows


def test_negatives_without_an_example(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("\n")
    code, _, err = run(capsys, "run", "steer", "--negatives", str(file))
    assert code == 2 and "holds no example" in err


def test_no_permission(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    page = str(tmp_path / "a.html")
    code, _, err = run(capsys, "see", TEXT, "--model", "tiny:llama", "--html", page)
    assert code == 2 and "no permission" in err and not list(tmp_path.iterdir())


def test_weights_with_nan(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tiny("llama")
    broken.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("inf")
    monkeypatch.setattr(zoo, "load", lambda name, **_: (broken, Words()))
    code, _, err = run(capsys, "see", TEXT)
    assert code == 2 and "not finite" in err


def test_check_says_ok_and_exits_with_it(capsys: Any) -> None:
    code, out, _ = run(capsys, "check", "tiny:mistral")
    assert code == 0 and "prefill = decode" in out
    code, out, _ = run(capsys, "check", "tiny:llama", "--json", "-")
    assert code == 0 and json.loads(out)["ok"]


@pytest.mark.parametrize("fact", ["distance", "waad", "thumbnail"])
def test_check_finds_a_wrong_fact(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FACTS[fact].finish
    monkeypatch.setattr(FACTS[fact], "finish", lambda self, sums: 1.01 * real(self, sums))
    failed = [f for f in regard.check(tiny("llama")).findings if f.status == "failed"]
    assert "facts" in [f.what for f in failed] and fact in failed[0].detail


def test_check_fails_loudly(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that lets a causal model see the future must not pass."""
    from regard.core import Mask
    from regard.reach import transformers as door

    monkeypatch.setattr(door, "from_mask_function", lambda *a, **k: Mask.full())
    code, out, _ = run(capsys, "check", "tiny:llama", "--json", "-")
    failed = {f["what"] for f in json.loads(out)["findings"] if f["status"] == "failed"}
    assert code == 1 and {"same output", "prefill = decode"} <= failed


def test_reproduce_makes_its_folder_and_names_the_file(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.lab import reproduce
    from regard.lab.reproduce import harness

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "root", lambda: None)
    monkeypatch.setattr(reproduce, "run", lambda slug, **given: seen.append(given["out"]))
    monkeypatch.setattr(reproduce, "table", lambda result: "verdicts")
    seen = list[Path]()
    for args in (["--quick"], ["--out", "new/deep"]):
        code, out, err = run(capsys, "reproduce", "sink-emergence", *args)
        assert code == 0 and "verdicts" in out, err
        name = "sink-emergence.quick.json" if "--quick" in args else "sink-emergence.json"
        assert err.strip() == f"result: {seen[-1] / name}"
    assert seen == [tmp_path / "reproductions", Path("new/deep")]


def test_lists(capsys: Any) -> None:
    code, out, _ = run(capsys, "methods", "--json", "-")
    assert code == 0 and len(json.loads(out)) == 27
    code, out, _ = run(capsys, "methods", "see")
    assert code == 0 and "sink-emergence" in out
    code, out, _ = run(capsys, "models")
    assert code == 0 and "smollm2-135m" in out


def test_help_of_every_verb(capsys: Any) -> None:
    for args in (
        [],
        ["see"],
        ["check"],
        ["models"],
        ["methods"],
        ["reproduce"],
        ["bench"],
        ["bench", "see"],
        ["bench", "act"],
        ["bench", "decode"],
        ["bench", "speech"],
    ):
        code, out, _ = run(capsys, *args, "--help")
        assert code == 0 and "Usage" in out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a \x1b[31mred\x1b[0m word"), 2, r"a \x1b[31mred\x1b[0m word"),
        (RuntimeError("CUDA out of memory"), 2, "CUDA out of memory"),
        (TypeError("unexpected keyword"), 70, "This is a fault of regard"),
        (OverflowError("int too large"), 2, "int too large"),
        (ValueError("x" * 5000), 2, "x ..."),
    ],
)
def test_one_line_for_every_error(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("REGARD_DEBUG", raising=False)
    monkeypatch.setattr("regard.catalog.methods", fail)
    got, _, err = run(capsys, "methods")
    assert got == code and said in err and err.count("\n") == 1 and len(err) < 1000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["see", "some words", "--seed", "3"], "--seed is for the prompt of an image"),
        (["see", "some words", "--transcript", "x"], "--transcript is for a sound"),
        (["see", "a red circle", "--model", "shapes-sd", "--max-tokens", "9"], "is for a text"),
        (["see", "memo.m4a"], "there is no sound memo.m4a"),
        (["see", "my photo.png", "what?"], "there is no picture my photo.png"),
        (["see", "book.txt"], "write @book.txt to read it"),
        (["see", "noise.bin"], "holds no text, picture or sound that can be read"),
        (["see", "folder"], "is a folder"),
        (["see", "no words", "really?"], "name a picture first"),
    ],
)
def test_inputs_are_what_they_contain(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("words of a book")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    code, _, err = run(capsys, *words)
    assert code == 2 and said in " ".join(err.split())
