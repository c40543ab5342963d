"""Tables of trials: means, paired differences, intervals, the page, against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from regard.errors import InputError
from regard.lab.trials.configurations import read
from regard.lab.trials.frame import Scores
from regard.lab.trials.page import load, page
from regard.lab.trials.summary import result, rows, table


def _values(key: str, *scores: float, held: float = 8.0, read: float = 4.0) -> Any:
    return {n: {key: x, "held": held, "read": read} for n, x in enumerate(scores)}


def _found(trial: str = "ruler") -> Scores:
    if trial == "perplexity":
        values = {"full": {"text": _values("nll", 1.0, 3.0)},
                  "h2o@0.5": {"text": _values("nll", 1.5, 3.5, held=4.0, read=2.0)}}  # fmt: skip
        return Scores(values, {}, {"h2o@0.5": ["H2O: a note"]}, [], [])
    full = {"a": _values("recall", 1, 0.5), "b": _values("recall", 0, 0.25),
            "c": _values("recall", 1, 1)}  # fmt: skip
    h2o = {"a": _values("recall", 0.5, 0.5, held=2.0), "c": _values("recall", 1, 0, held=2.0)}
    return Scores({"full": full, "h2o@0.5": h2o}, {"snapkv@0.5": {"a": "too | short"}}, {},
                 ["b"], ["b"])  # fmt: skip


def _result(trial: str) -> dict[str, Any]:
    return {
        "trial": trial,
        "model": "llama",
        "settings": {"length": 512, "tasks": ["a", "b"], "ceiling": 0.3},
        **result(trial, _found(trial), read("h2o,snapkv", ratios=[0.5])),
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2", "transformers": "5"},
        "command": "regard trial ruler",
        "date": "2026-01-01",
        "seconds": 61.0,
    }


def test_rows_of_several_tasks() -> None:
    made = rows("ruler", _found(), read("h2o,snapkv", ratios=[0.5]))
    found = {(r["configuration"], r["task"]): r for r in made}
    assert set(found) == {("full", t) for t in ("a", "b", "c", "all")} | {
        ("h2o@0.5", t) for t in ("a", "c", "all")
    }
    one = found["h2o@0.5", "all"]
    assert (one["tasks"], one["texts"]) == (2, 4)  # b is too hard
    assert one["recall"]["mean"] == 0.5 and found["full", "all"]["recall"]["mean"] == 0.875
    change = one["recall"]["difference"]
    assert change["mean"] == pytest.approx(-0.375) and change["low"] <= -0.375 <= change["high"]
    assert change["low"] < -0.375 < change["high"] <= 0
    assert one["held"] == 0.25 and one["read"] == 1.0 and one["ratio"] == 0.5
    assert "difference" not in found["full", "a"]["recall"]


def test_perplexity_is_the_exponential() -> None:
    full, cut, *_ = rows("perplexity", _found("perplexity"), read("h2o", ratios=[0.5]))
    assert full["nll"]["exp"]["mean"] == pytest.approx(math.exp(2.0))
    assert full["nll"]["low"] == 1.0 and full["nll"]["exp"]["high"] == pytest.approx(math.exp(3))
    same = {"mean": 0.5, "low": 0.5, "high": 0.5}  # paired: the texts differ, the change does not
    assert cut["nll"]["difference"] == same and cut["held"] == cut["read"] == 0.5


@pytest.mark.parametrize("trial", ["ruler", "perplexity"])
def test_terminal_and_page(trial: str, tmp_path: Path) -> None:
    made = json.loads(json.dumps(_result(trial), allow_nan=False))
    console = Console(width=120, record=True, file=(tmp_path / "shown").open("w"))
    console.print(table(made))
    shown = console.export_text()
    path = tmp_path / "one.json"
    path.write_text(json.dumps(made))
    text = page([path, path])
    assert text.count("```\nregard trial ruler\n```") == 2 and "a CPU" in text
    if trial == "ruler":
        assert "-0.38 (" in shown and "the 2 tasks together that the model can do" in shown
        assert "Below 0.3 recall of the full model" in shown and "snapkv@0.5 refused a" in shown
        assert "| b | 0.12 | 0.00 to 0.25 | too low to tell |" in text
        assert "### B" not in text and "too | short" in text
        assert text.index("### The 2 tasks together") < text.index("### A")
    else:
        assert "7.39" in shown and "+0.500 (+0.500 to +0.500)" in shown and "h2o@0.5: H2O" in shown
        assert (
            "| h2o@0.5 | 12.18 | 4.48 to 33.12 | +0.500 (+0.500 to +0.500) | 50 % | 50 % |" in text
        )


def test_what_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{}", "[", '{"trial": "ruler", "rows": []}'):
        path.write_text(text)
        with pytest.raises(InputError, match="no result of a trial"):
            load(path)
    with pytest.raises(InputError, match="no result of a trial"):
        load(tmp_path / "none.json")
