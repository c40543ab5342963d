"""The bench of cross-attention facts: its verdicts follow from what was measured."""

from __future__ import annotations

import pytest

from regard.errors import InputError
from regard.lab.bench import speech
from regard.lab.bench.record import Cell, Result


def measured(look: list[float], grown: float) -> list[str]:
    result = Result("speech", {}, {}, [dict(t) for t in speech.TARGETS])
    for row, seconds in (("plain", [1.0, 2.0, 1.0]), ("look", look), ("live", [])):
        result.cells[row] = Cell({"row": row}, values={"seconds": seconds})
    result.cells["memory"] = Cell({"row": "memory"}, values={"grown": grown})
    return [f"{said['verdict']}: {said['measured']}" for said in speech.judge(result)]


def test_verdicts() -> None:
    said = measured([1.1, 2.2, 1.3], 3.9e6)
    assert said == ["met: 1.10 (1.10 to 1.30)", "not measured: -", "met: 3.9 MB"]
    said = measured([1.3, 2.6, 1.1], 4.1e6)
    assert said[0] == "missed: 1.30 (1.10 to 1.30)" and said[2] == "missed: 4.1 MB"


def test_half_a_minute_is_half_a_minute() -> None:
    assert len(speech.half_minute(30.0)) == 480_000


def test_rounds() -> None:
    with pytest.raises(InputError, match="at least 1"):
        speech.run(rounds=0)
