"""The claims on speech run from end to end on real Whisper, a few utterances of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regard.lab import reproduce
from regard.see.cross_attention_explanation import claims as cross_attention_explanation


@pytest.mark.slow
@pytest.mark.real
def test_a_quick_run_settles_every_claim(tmp_path: Path) -> None:
    result = reproduce.run("cross-attention-explanation", quick=True, out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in cross_attention_explanation.CLAIMS]
    for found, stated in zip(result.claims, cross_attention_explanation.CLAIMS):
        if stated.judge is not None:
            assert found.verdict == stated.judge(found.values) and found.here


def _row(heads: list[list[float | None]], errors: float) -> dict[str, Any]:
    pearson = {"heads": heads, "layers": [0.5] * len(heads), "all": 0.5}
    arms = ("saliency", "pooled", "attention", "random steps", "random cells")
    curves = {arm: [0.0, errors, 100.0] for arm in arms}
    return {
        "input": {"pearson": pearson},
        "deletion": {"percent": [0.0, 50.0, 100.0], "errors": curves},
    }


def test_the_sheet_shows_the_means_of_all_sentences() -> None:
    pytest.importorskip("PIL")
    from regard.see.cross_attention_explanation import sheet as sheet

    rows = [_row([[0.2, None], [0.4, 0.0]], 20.0), _row([[0.4, 0.2], [0.0, 0.0]], 60.0)]
    table = sheet._table([row["input"]["pearson"] for row in rows])
    assert table == [[pytest.approx(0.3), 0.1, 0.5], [0.2, 0.0, 0.5]]
    names = {"attention": 1, "saliency of the sound": 2, "saliency of the encoder’s output": 3}
    example = {
        "pieces": [" a", " b", "."], "model": "tiny.en", "seconds_per_step": 0.02,
        "spectrogram": [[0.1 * n for n in range(8)]] * 4,
        "maps": {name: [[0.0, 1.0, 0.0, 0.5]] * 3 for name in names},
        "words": [["a", 0.0, 0.04], ["b", 0.04, 0.08]], "spans": [[0, 2], [2, 4], None],
    }  # fmt: skip
    picture, caption = sheet.speech_sheet({"tiny.en": rows, "base": rows}, example)
    assert picture.width == 1720 and caption.count("2 sentences") == 2
    unplaced, _ = sheet.speech_sheet({"tiny.en": rows, "base": rows}, {**example, "spans": None})
    assert unplaced.size == picture.size and unplaced.tobytes() != picture.tobytes()
