"""The bench of ACT on a tiny model: rounds that resume, ratios, verdicts, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from regard.errors import InputError
from regard.lab.bench import pages
from regard.lab.bench.record import load
from regard.steer.act import cost as act

from ..models import deep


class Words:
    def __call__(self, text: str, **_: Any) -> BatchEncoding:
        ids = [3 + sum(map(ord, w)) % 120 for w in text.split()[:200]]
        return BatchEncoding({"input_ids": torch.tensor([ids])})


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(6, steep=30)
    monkeypatch.setattr("regard.zoo.load", lambda name, **_: (model, Words()))
    monkeypatch.setattr(act, "_apart", lambda: {"bytes": 90_000_000, "how": "x", "sinks": 5})


def test_a_run_goes_on_and_makes_a_page(tmp_path: Path) -> None:
    path, said = tmp_path / "act.json", list[str]()
    given: dict[str, Any] = {"tokens": 64, "out": path, "threads": 1, "progress": said.append}
    act.run("tiny", rounds=1, **given)
    result = act.run("tiny", rounds=3, **given)
    assert len(said) == 3 and said[-1].startswith("round 3 of 3: plain ")
    assert result.settings["heads all"] == 12 and result.settings["heads few"] == 2
    assert len(act.ratios(result, "few")) == len(act.ratios(result, "all")) == 3
    assert 0 < result.cells["all"].values["sinks"] < 0.5
    pages.page("act", path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text == act.markdown(load(path), path.as_posix())
    assert "Medians of 3 rounds" in text and "90 MB | met" in text
    with pytest.raises(InputError, match="another run"):
        act.run("tiny", rounds=3, **{**given, "tokens": 32})
    with pytest.raises(InputError, match="at least 16"):
        act.run("tiny", tokens=4)
    with pytest.raises(InputError, match="4096 positions"):
        act.run("tiny", tokens=2**20)
    with pytest.raises(InputError, match="the text has 200 tokens"):
        act.run("tiny", tokens=300)


def test_verdicts(tmp_path: Path) -> None:
    result = act.run("tiny", tokens=32, rounds=1, threads=1, progress=lambda line: None)
    for row, times in {
        "plain": [1.0, 2.0, 1.0],
        "few": [1.1, 2.2, 1.9],
        "all": [2.0, 3.0, 1.7],
    }.items():
        result.cells[row].values["seconds"] = times
    few, every, head = act.judge(result)
    assert (few["verdict"], few["measured"]) == ("met", "1.10 (1.10 to 1.90)")
    assert (every["verdict"], every["measured"]) == ("missed", "1.70 (1.50 to 2.00)")
    assert head["verdict"] == "met"
    del result.cells["head"]
    assert act.judge(result)[2]["verdict"] == "not measured"


@pytest.mark.slow
def test_one_long_head_needs_little_memory() -> None:
    found = act.long_head()
    assert 1e6 < found["bytes"] < 200e6 and found["sinks"] > 50
