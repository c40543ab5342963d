"""The claims on speech run from end to end on real Whisper, a few utterances of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from regard import reproduce
from regard.reproduce import cross_attention_explanation


@pytest.mark.slow
@pytest.mark.real
def test_a_quick_run_settles_every_claim(tmp_path: Path) -> None:
    result = reproduce.run("cross-attention-explanation", quick=True, out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in cross_attention_explanation.CLAIMS]
    for found, stated in zip(result.claims, cross_attention_explanation.CLAIMS):
        if stated.judge is not None:
            assert found.verdict == stated.judge(found.values) and found.here
