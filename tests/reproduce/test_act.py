"""The claims of ACT: run end to end on a tiny model, controls as described, judges that judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.lab import reproduce
from regard.lab.reproduce.harness import Journal
from regard.steer.act import claims as act
from regard.steer.act.method import ACT
from regard.zoo.tiny import tiny

from ..models import Words

IDS = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
FIXED: dict[str, Any] = {"threshold": 0.05, "skip_layers": (0, 0)}


def test_it_runs_on_a_tiny_model(tmp_path: Path) -> None:
    result = reproduce.run("act", quick=True, model=(tiny("llama"), Words()), out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in act.CLAIMS]
    for claim in result.claims:
        assert claim.verdict in ("reproduced", "partly", "not reproduced", "needs scale")
        if claim.verdict != "needs scale":
            assert claim.here and claim.control and claim.values
    gain = next(c for c in result.claims if c.key == "gain")
    assert 1 <= gain.values["heads"] <= 2  # a fifth of eight heads
    listed = result.settings["head list"]
    assert sum(map(len, listed.values())) == gain.values["heads"]
    histogram = next(c for c in result.claims if c.key == "not-all-help").values
    assert sum(histogram["histogram"].values()) + histogram["unchanged"] == 8
    assert json.loads((tmp_path / "act.quick.json").read_text())["seeds"]
    assert [f.name for f in tmp_path.iterdir()] == ["act.quick.json"]


def test_heads_resume_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted calibration leaves its heads beside the journal."""
    from regard.steer.act.heads import HeadFilter

    tried: list[tuple[int, int]] = []
    real = HeadFilter._try

    def stop(self: Any, states: Any, layer: int, head: int) -> Any:
        tried.append((layer, head))
        if len(tried) == 4:
            raise KeyboardInterrupt
        return real(self, states, layer, head)

    monkeypatch.setattr(HeadFilter, "_try", stop)
    model = (tiny("llama"), Words())
    with pytest.raises(KeyboardInterrupt):
        reproduce.run("act", quick=True, model=model, out=tmp_path)
    reproduce.run("act", quick=True, model=model, out=tmp_path)
    assert tried[3:] == [(0, 3), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]


def test_the_controls_change_what_they_say() -> None:
    model = tiny("llama")
    found = {}
    for name, method in {
        "sinks": ACT(**FIXED),
        "random": act.RandomColumns(**FIXED),
        "first": act.FirstToken(keep_first=0, **FIXED),
    }.items():
        with torch.no_grad(), regard.apply(model, method):
            model(IDS)
        found[name] = method.found()[0]
    assert torch.equal(found["random"].sum(-1), found["sinks"].sum(-1))
    assert bool(found["sinks"].any()) and not torch.equal(found["random"], found["sinks"])
    assert not bool(found["random"][..., 0].any())
    assert bool(found["first"][..., 0].any()) and not bool(found["first"][..., 1:].any())


def test_held_out_sentences_are_others() -> None:
    size = act.Size()
    for task in act.TASKS:
        made = [e.text for e in act._examples(task, size)]
        assert len(made) == size.train + size.held_out == len(set(made))


def test_prompts_are_long_enough() -> None:
    setup = type(
        "S", (), {"tokenizer": Words(), "model": tiny("llama"), "journal": Journal(None, {})}
    )
    for kind in act.KINDS:
        windows = list(act._windows(setup, kind, 12, act.TOKENS))  # type: ignore[arg-type]
        assert [w.shape for w in windows] == [(1, act.TOKENS)] * 12


LOWS = {f"low_{k}": 30.0 for k in act.KINDS}


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("hidden-sinks", LOWS, "reproduced"),
        ("hidden-sinks", {**LOWS, "low_code": 19.0}, "partly"),
        ("hidden-sinks", {f"low_{k}": 20.0 for k in act.KINDS}, "not reproduced"),
        ("not-all-help", {"raising": 6, "lowering": 6}, "reproduced"),
        ("not-all-help", {"raising": 5, "lowering": 6}, "partly"),
        ("not-all-help", {"raising": 3, "lowering": 2}, "not reproduced"),
        ("gain", {"low": 0.1, "over_heads_low": 0.1, "over_columns_low": 0.1}, "reproduced"),
        ("gain", {"low": 0.1, "over_heads_low": -0.1, "over_columns_low": 0.1}, "partly"),
        ("gain", {"low": -0.1, "over_heads_low": 0.1, "over_columns_low": 0.1}, "not reproduced"),
        ("first-token", {"first": 0.4, "later": 0.1, "low": 0.2}, "reproduced"),
        ("first-token", {"first": 0.4, "later": 0.3, "low": 0.05}, "partly"),
        ("first-token", {"first": 0.4, "later": -0.3, "low": 0.5}, "reproduced"),
        ("first-token", {"first": -0.1, "later": 0.3, "low": -0.5}, "not reproduced"),
    ],
)
def test_the_judges(key: str, values: dict[str, Any], said: str) -> None:
    claim = next(c for c in act.CLAIMS if c.key == key)
    assert claim.settle(values, here="", control="").verdict == said


def test_settling_made_up_numbers() -> None:
    """Differences and intervals come from the numbers given, in the right direction."""
    found = {
        "plain": {"margins": [0.0, 1.0, 2.0], "correct": [0.0, 1.0, 1.0]},
        "chosen": {"margins": [1.0, 2.0, 3.0], "correct": [1.0, 1.0, 1.0]},
        "heads": {"margins": [0.5, 1.5, 2.5], "correct": [0.0, 1.0, 1.0]},
        "columns": {"margins": [-1.0, 0.0, 1.0], "correct": [0.0, 0.0, 1.0]},
    }
    stated = {c.key: c for c in act.CLAIMS}
    claim = act._settle_gain(stated["gain"], found, {"chosen": {"2": [0, 1]}})
    assert claim.verdict == "reproduced" and claim.values["gain"] == 1.0
    assert claim.values["over_heads_low"] == 0.5 and claim.values["over_columns_low"] == 2.0
    assert claim.values["random_columns"] == -1.0 and claim.values["heads"] == 2
    assert "66.7 to 100.0 %" in claim.here
    rises = {"plain": [3.0, 3.0], "first": [4.0, 4.0], "later": [3.2, 3.2], "columns": [3.1, 3.1]}
    claim = act._settle_first(stated["first-token"], rises)
    assert claim.verdict == "reproduced" and claim.values["low"] == pytest.approx(0.8)
