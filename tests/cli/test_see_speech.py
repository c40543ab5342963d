"""regard see on sound: the command, its output, and every slip a person can make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regard import zoo
from regard.errors import InputError
from regard.zoo.tiny import tiny

from .clips import sound
from .command import run


def test_a_clip_gives_transcript_words_page_and_json(
    ears: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    clip = sound(tmp_path / "a.wav")
    html, out = tmp_path / "o.html", tmp_path / "o.json"
    args = ["see", clip, "--model", ears, "--transcript", "ab <i> cd"]
    code, shown, err = run(capsys, *args, "--html", str(html), "--json", str(out))
    assert code == 0, err
    page = json.loads(out.read_text())
    assert page["kind"] == "speech" and page["frames"] == 50 and page["all_frames"] == 1500
    assert [len(row) for row in page["maps"]["layer 1"]] == [50] * len(page["words"])
    assert "word" in shown and "1.00 s, 50 of 1500 encoder steps" in shown
    assert any("was given" in note for note in page["meta"]["notes"])
    assert "Cross-attention of a transcript" in html.read_text()
    code, shown, err = run(capsys, *args, "--json", "-")
    assert code == 0 and json.loads(shown)["transcript"] == page["transcript"]


def test_what_was_done_to_the_sound_is_said(
    ears: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy", reason="scipy is part of the extra 'speech'")
    clip = sound(tmp_path / "a.wav", rate=8_000, channels=2)
    code, shown, err = run(capsys, "see", clip, "--model", ears, "--transcript", "abc")
    assert code == 0, err
    assert "2 channels were averaged" in shown and "resampled from 8,000" in shown


def test_a_transcript_that_does_not_fit_is_refused(
    ears: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.parts.speech import cross_attention as speech

    clip, real = sound(tmp_path / "a.wav"), speech.cross_attention

    def unlikely(*args: Any, **kwargs: Any) -> Any:
        seen = real(*args, **kwargs)
        seen.fit = -5.0  # of 29 tokens drawn at random each has -3.4
        return seen

    monkeypatch.setattr(speech, "cross_attention", unlikely)
    code, _, err = run(capsys, "see", clip, "--model", ears, "--transcript", "abc")
    assert code == 2 and "does not fit the sound" in " ".join(err.split())


def test_every_slip_gets_one_line(
    ears: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sound(tmp_path / "good.wav")
    (tmp_path / "text.wav").write_text("only words")
    (tmp_path / "none.wav").touch()
    sound(tmp_path / "quiet.wav", loud=0)
    sound(tmp_path / "long.wav", seconds=30.5)
    text_model = tmp_path / "llama"
    tiny("llama").save_pretrained(text_model)
    at = str(tmp_path)
    cases: list[tuple[list[str], str]] = [
        ([f"{at}/text.wav"], "is a text file"),
        ([f"{at}/none.wav"], "empty file"),
        ([f"{at}/quiet.wav"], "is silent"),
        ([f"{at}/long.wav"], "lasts 30.5 s"),
        ([f"{at}/missing.wav"], "there is no sound"),
        ([good, "--transcript", " "], "--transcript is empty"),
        ([good, "--transcript", "abc " * 30], "room for"),
        ([good, "--task", "sing"], "transcribe or translate"),
        ([good, "--language", "de"], "many languages"),
        ([good, "--layers", "0"], "--layers is for a text or the prompt of an image"),
        ([good, "--html", f"{at}/no/x.html"], "does not exist"),
        (["some words", "--language", "de"], "--language is for a sound"),
    ]
    import re

    for args, why in cases:
        code, _, err = run(capsys, "see", *args, "--model", ears)
        words = " ".join(err.split())
        assert code == 2 and re.search(why, words), (args, err)
        assert len(err.strip().splitlines()) <= 4, err
    code, _, err = run(capsys, "see", good, "--model", str(text_model))
    assert code == 2 and "no cross attention" in " ".join(err.split())
    code, _, err = run(capsys, "see", "some words", "--model", ears)
    assert code == 2 and "give it a sound file" in " ".join(err.split())


@pytest.mark.slow
def test_the_real_model_on_a_shipped_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        zoo.load("whisper-tiny.en")
    except InputError as problem:
        pytest.skip(str(problem))
    out = tmp_path / "o.json"
    code, shown, err = run(capsys, "see", "@lighthouse", "--compare", "--json", str(out))
    assert code == 0, err
    page: dict[str, Any] = json.loads(out.read_text())
    assert "lighthouse keeper" in page["transcript"] and "true start" in shown
    assert page["errors"]["start"] < 0.2 < page["errors"]["theirs"]
