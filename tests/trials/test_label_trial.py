"""Labels as a trial: the same numbers as `labels`, files, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regard.errors import InputError
from regard.lab.trials.configurations import read
from regard.lab.trials.frame import run
from regard.lab.trials.label_trial import batches, task
from regard.lab.trials.labels import TASKS, Example, labels
from regard.steer.act.method import ACT
from regard.zoo.tiny import tiny

from .words import Words


def test_the_numbers_are_those_of_label_scoring() -> None:
    model = tiny("llama")
    how, examples = task("sentiment", examples=6)
    assert how == TASKS["sentiment"]
    line = read("act:skip_layers=0/0,threshold=0.05,beta=0.1,h2o", ratios=[0.3])
    found = run(model, line, batches(model, Words(), examples, how), show=False).values
    methods: dict[str, list[Any]] = {
        "full": [],
        line[1].key: [ACT(skip_layers=(0, 0), threshold=0.05, beta=0.1)],
    }
    for key, own in methods.items():
        plain = labels(model, Words(), examples, how.labels, template=how.template, methods=own,
                       cached=True)  # fmt: skip
        values = [found[key]["labels"][n] for n in range(6)]
        assert [v["margin"] for v in values] == pytest.approx(plain.margins, abs=1e-5)
        assert [v["correct"] for v in values] == [float(c) for c in plain.correct]
    margins = {tuple(v["margin"] for v in own["labels"].values()) for own in found.values()}
    assert len(margins) == 3


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    how, found = task(str(path))
    assert how.labels == ("x", "y") and how.template == "{text}\nLabel:"
    assert found == [Example("a", "x"), Example("b", "y")]
    assert task(str(path), template="Is {text}", examples=1)[0].template == "Is {text}"


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    for given, how, message in (
        ("sentimant", {}, "Did you mean 'sentiment'"),
        ("none.jsonl", {}, "no file none.jsonl"),
        ("sentiment", {"template": "{text}"}, "goes with a file"),
        (str(path), {"template": "Is"}, "no {text}"),
        ("sentiment", {"examples": 0}, "examples is at least 1"),
    ):
        with pytest.raises(InputError, match=message.replace("{", "[{]")):
            task(given, **how)  # type: ignore[arg-type]
    model = tiny("llama")
    how_, found = task(str(path))
    with pytest.raises(InputError, match="at least two labels"):
        batches(model, Words(), found, how_)
