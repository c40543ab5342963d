"""bench facts: it measures, goes on where it was cut off, and judges by the rules it states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regard.errors import InputError
from regard.lab.bench import facts as bench
from regard.lab.bench.record import Cell, Result, load

QUIET: Any = {"rounds": 2, "model": False, "progress": lambda line: None}


def test_it_measures_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "facts.json"
    first = bench.run([64], out=out, heads=(4, 2), dim=16, **QUIET)
    again = bench.run([64, 96], out=out, heads=(4, 2), dim=16, **QUIET)
    assert again.cells["64 | received"] == first.cells["64 | received"]
    assert load(out) == again and bench.lengths_of(again) == [64, 96]
    assert max(again.cells["exact"].values.values()) < 1e-5
    text = bench.markdown(again, "x.json")
    assert text.count("| received, entropy |") == 2 and "not measured" in text


def test_verdicts_follow_from_the_ratios() -> None:
    def result(ours: float, device: str) -> Result:
        settings = {"device": device, "dtype": "bfloat16", "rounds": 1}
        made = Result("facts", settings, {}, [dict(t) for t in bench.TARGETS])
        made.cells["exact"] = Cell({}, values={"received": 1e-3})
        for name, spent in (("fused attention", 1.0), ("received, entropy", ours)):
            made.cells[f"16384 | {name}"] = Cell(
                {"row": name, "tokens": 16384}, values={"seconds": [spent], "peak_bytes": 1}
            )
        return made

    def verdict(ours: float, device: str = "cuda") -> list[str]:
        return [t["verdict"] for t in bench.judge(result(ours, device))]

    assert verdict(1.6) == ["met", "not measured", "met"]
    assert verdict(1.8)[0] == "missed"
    assert verdict(1.2, "cpu")[0] == "not measured"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": (3, 2)}, "not a multiple"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"lengths": [1]}, "at least 2"),
    ],
)
def test_bad_input(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        bench.run(**{"lengths": [64], **QUIET, **change})
