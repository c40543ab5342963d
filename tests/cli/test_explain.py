"""regard explain and regard trial explanation: pages, resumed work, and every slip of a person."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage", reason="scikit-image is part of the extra 'explain'")

from regard.see.cross_attention_explanation import saliency
from regard.zoo.tiny import tiny

from .clips import sound
from .command import run

SMALL = ["--masks", "8", "--segments", "20", "--step", "50", "--frames", "real", "--batch", "2"]
Capture = pytest.CaptureFixture[str]


def test_a_clip_gives_correlations_page_and_json(
    ears: str, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("plotly")
    clip, html, out = sound(tmp_path / "a.wav"), tmp_path / "o.html", tmp_path / "o.json"
    args = ["explain", clip, "--model", ears, "--transcript", "ab cd", *SMALL]
    code, shown, err = run(capsys, *args, "--html", str(html), "--json", str(out))
    assert code == 0, err
    found = json.loads(out.read_text())
    assert len(found["pieces"]) == 6 and len(found["maps"]["attention"][0]) == 50
    assert f"{found['input']['pearson']['all']:.3f}" in shown and "split-half" in shown
    assert found["deletion"]["percent"] == [0, 50, 100]
    assert "Cross-attention and saliency" in html.read_text()
    code, shown, err = run(capsys, *args, "--json", "-")
    assert code == 0 and json.loads(shown)["input"] == found["input"]
    assert "the window was cut" in " ".join(err.split())


def test_what_was_done_to_the_sound_is_said(ears: str, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("scipy", reason="scipy is part of the extra 'speech'")
    clip = sound(tmp_path / "a.wav", rate=8_000, channels=2)
    code, _, err = run(capsys, "explain", clip, "--model", ears, "--transcript", "abc", *SMALL)
    said = " ".join(err.split())
    assert code == 0 and "2 channels were averaged" in said and "resampled from 8,000" in said


def test_a_killed_run_goes_on(
    ears: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, state, out = sound(tmp_path / "a.wav"), tmp_path / "work.bin", tmp_path / "o.json"
    args = ["explain", clip, "--model", ears, "--transcript", "abc", *SMALL, "--json", str(out)]
    assert run(capsys, *args)[0] == 0
    want = json.loads(out.read_text())
    real, run_masks, calls = saliency.saliency, [0], saliency.divergence

    def often(*given: object, **how: object) -> object:
        return real(*given, **how, save_every=2)  # type: ignore[arg-type]

    def dying(*given: object) -> object:
        run_masks[0] += 1
        if run_masks[0] == 4:
            raise RuntimeError("killed")
        return calls(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("regard.see.cross_attention_explanation.method.saliency", often)
    monkeypatch.setattr(saliency, "divergence", dying)
    code, _, err = run(capsys, *args, "--resume", str(state))
    assert code == 70 and "killed" in err
    assert state.is_file() and run_masks[0] == 4
    code, _, err = run(capsys, *args, "--resume", str(state))
    assert code == 0, err
    found = json.loads(out.read_text())
    assert run_masks[0] == 4 + 1 + 4  # one batch of the sound was left, and four of the encoding
    assert all(found[k] == want[k] for k in ("input", "states", "reliability", "deletion"))


def test_every_slip_gets_one_line(ears: str, tmp_path: Path, capsys: Capture) -> None:
    good, at = sound(tmp_path / "good.wav"), str(tmp_path)
    (tmp_path / "text.wav").write_text("only words")
    (tmp_path / "none.wav").touch()
    sound(tmp_path / "quiet.wav", loud=0)
    sound(tmp_path / "long.wav", seconds=30.5)
    (tmp_path / "no.bin").write_text("no saliency")
    tiny("llama").save_pretrained(tmp_path / "llama")
    abc = ["--transcript", "abc"]
    cases: list[tuple[list[str], str]] = [
        ([f"{at}/text.wav"], "no audio"),
        ([f"{at}/none.wav"], "empty file"),
        ([f"{at}/quiet.wav"], "is silent"),
        ([f"{at}/long.wav"], "lasts 30.5 s"),
        ([f"{at}/missing.wav"], "there is no file"),
        ([good, "--model", f"{at}/llama"], "name a speech model"),
        ([good, "--transcript", " "], "--transcript is empty"),
        ([good, "--transcript", "abc " * 30], "room for"),
        ([good, "--task", "sing"], "transcribe or translate"),
        ([good, "--language", "de"], "many languages"),
        ([good, *abc, "--step", "7"], "divides 100"),
        ([good, *abc, "--frames", "some"], "frames is one of all, real"),
        ([good, *abc, "--segments", "many"], "--segments: 'many' is no list"),
        ([good, *abc, "--baseline", "noise"], "baseline is one of mean, zero"),
        ([good, *abc, "--antithetic", "--masks", "9"], "come in pairs"),
        ([good, *abc, "--resume", f"{at}/no.bin"], "is not a saved saliency run"),
        ([good, *abc, "--html", f"{at}/no/x.html"], "does not exist"),
    ]
    capsys.readouterr()  # transformers' own words while it saved the model
    before = sorted(p.name for p in tmp_path.iterdir())
    for args, why in cases:
        model = [] if "--model" in args else ["--model", ears]
        code, shown, err = run(capsys, "explain", *SMALL, *args, *model)
        assert code == 2 and not shown and re.search(why, " ".join(err.split())), (args, err)
        assert len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing half-written


# -- many utterances -------------------------------------------------------------------------------
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    sound(data / "a.wav")
    sound(data / "b.wav", seconds=0.5)
    (data / "b.txt").write_text("some words", encoding="utf-8")
    return data


def test_a_table_over_a_folder_goes_on_past_a_bad_file(
    ears: str, tmp_path: Path, capsys: Capture
) -> None:
    data, out = folder(tmp_path), tmp_path / "o.json"
    (data / "broken.wav").write_text("only words")
    args = ["trial", "explanation", "--data", str(data), "--model", ears, *SMALL]
    code, shown, err = run(capsys, *args, "--json", str(out))
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out.read_text())["utterances"]}
    assert list(rows) == ["a.wav", "b.wav", "broken.wav"]
    assert "no audio" in rows["broken.wav"]["problem"] and "problem" not in rows["a.wav"]
    means = json.loads(out.read_text())["means"]
    each = [rows[n]["input"]["pearson"]["all"] for n in ("a.wav", "b.wav")]
    known = [v for v in each if v is not None]  # a constant map has no correlation
    assert means["sound"]["mean"] == pytest.approx(np.mean(known))
    assert means["sound"]["of"] == len(known) > 0
    assert "Means" in shown and not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("corrected", [False, True])
def test_an_interrupted_table_goes_on(
    corrected: bool, ears: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.see.cross_attention_explanation import method as method

    data, out = folder(tmp_path), tmp_path / "o.json"
    args = ["trial", "explanation", "--data", str(data), "--model", ears, *SMALL]
    args += ["--json", str(out)]
    real, explained = method.explain, list[int]()

    def dying(*given: object, **how: object) -> object:
        if len(explained) == 1:
            raise RuntimeError("killed")
        explained.append(1)
        return real(*given, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(method, "explain", dying)
    code, _, err = run(capsys, *args)
    assert code == 70 and "killed" in err
    assert not out.exists() and len(explained) == 1
    if corrected:
        (data / "a.txt").write_text("what was said", encoding="utf-8")
    explained.append(1)
    assert run(capsys, *args)[0] == 0
    # the first utterance is not explained again, unless what is known of it is another
    assert len(explained) == 3 + corrected
    assert len(json.loads(out.read_text())["utterances"]) == 2


def test_slips_of_the_table_get_one_line(ears: str, tmp_path: Path, capsys: Capture) -> None:
    data, empty, llama = folder(tmp_path), tmp_path / "empty", tmp_path / "llama"
    empty.mkdir()
    tiny("llama").save_pretrained(llama)
    cases = [
        (["--data", str(tmp_path / "nowhere")], "is no folder"),
        (["--data", str(empty)], "no audio file"),
        (["--data", str(data), "--step", "7"], "divides 100"),
        (["--data", str(data), "--task", "sing"], "transcribe or translate"),
        (["--data", str(data), "--language", "de"], "many languages"),
        (["--data", str(data), "--baseline", "noise"], "baseline is one of mean, zero"),
        (["--data", str(data), "--model", str(llama)], "name a speech model"),
    ]
    capsys.readouterr()
    for args, why in cases:
        model = [] if "--model" in args else ["--model", ears]
        code, _, err = run(capsys, "trial", "explanation", *SMALL, *args, *model)
        assert code == 2 and why in " ".join(err.split()), (args, err)
        assert len(err.strip().splitlines()) == 1, err


def test_a_page_that_cannot_be_drawn_is_refused_before_any_work(
    ears: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    args = ["explain", sound(tmp_path / "a.wav"), "--model", str(tmp_path / "no model"), *SMALL]
    code, _, err = run(capsys, *args, "--html", str(tmp_path / "o.html"))
    assert code == 2 and "regard[report]" in err and not (tmp_path / "o.html").exists()
