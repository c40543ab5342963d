"""Label scoring: margins by hand, batches as one by one, methods, made sentences, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from regard.errors import InputError
from regard.lab.intervals import bootstrap
from regard.lab.trials.labels import TASKS, Example, labels, read_examples, sentences
from regard.steer.act.method import ACT
from regard.zoo.tiny import tiny

EXAMPLES = [
    Example(f"{'very ' * (n % 4)}{w} indeed", "good" if n % 2 else "bad")
    for n, w in enumerate(("sunny", "rainy", "windy", "foggy", "warm", "icy", "mild"))
]


class Words:
    """One token a word."""

    def __call__(self, text: str, **_: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": [3 + sum(map(ord, w)) % 100 for w in text.split()]})


def test_margins_and_predictions_by_hand() -> None:
    model = tiny("llama")
    found = labels(model, Words(), EXAMPLES, batch_size=3)
    assert found.labels == ["bad", "good"]
    bad, good = (Words()(w).input_ids[0] for w in found.labels)
    for n, example in enumerate(EXAMPLES):
        ids = torch.tensor([Words()(f"{example.text}\nLabel:").input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        lead = float(logits[good] - logits[bad])
        assert found.predicted[n] == ("good" if lead > 0 else "bad")
        assert found.margins[n] == pytest.approx(lead if n % 2 else -lead, abs=1e-5)
        assert found.correct[n] == (found.margins[n] > 0)
    assert found.accuracy == sum(found.correct) / 7
    data = json.loads(json.dumps(found.as_dict()))
    low, high = data["margin_interval"]
    assert low <= found.margin <= high and data["examples"] == 7


@pytest.mark.parametrize("methods", [[], [ACT(beta=0.2, threshold=0.06, skip_layers=(0, 0))]])
def test_one_by_one_over_the_cache(methods: list[Any]) -> None:
    model = tiny("llama")
    whole = labels(model, Words(), EXAMPLES, methods=methods)
    single = labels(model, Words(), EXAMPLES, methods=methods, batch_size=1)
    assert whole.margins == pytest.approx(single.margins, abs=1e-5)
    cached = labels(model, Words(), EXAMPLES, methods=methods, cached=True)
    if methods:
        plain = labels(model, Words(), EXAMPLES)
        assert max(abs(a - b) for a, b in zip(plain.margins, whole.margins)) > 1e-3
    else:
        assert cached.margins == pytest.approx(whole.margins, abs=1e-5)


def test_sentences() -> None:
    for task, how in TASKS.items():
        made = sentences(task, 80, seed=3)
        assert len({e.text for e in made}) == 80 and made == sentences(task, 80, seed=3)
        assert made != sentences(task, 80, seed=4) and made[:20] == sentences(task, 20, seed=3)
        count = [sum(e.label == name for e in made) for name in how.labels]
        assert max(count) - min(count) <= 1 and "{text}" in how.template
        assert not any("{" in e.text for e in made)
        assert all(e.text.endswith(".") and e.text[0].isupper() for e in made)
    with pytest.raises(InputError, match="Did you mean 'topic'"):
        sentences("topics")
    with pytest.raises(InputError, match="fewer than 9999"):
        sentences("topic", 9999)


def test_interval() -> None:
    low, high = bootstrap([0.0, 1.0] * 50)
    assert 0.35 < low < 0.5 < high < 0.65


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y", "more": 1}\n')
    assert read_examples(path) == [Example("a", "x"), Example("b", "y")]
    for text, message in (("", "no example"), ('{"text": 1, "label": "x"}', "line 1"), ("[", "1")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_examples(path)
    with pytest.raises(InputError, match="no file"):
        read_examples(tmp_path / "none.jsonl")


def test_input_that_does_not_fit() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="no example"):
        labels(model, Words(), [])
    with pytest.raises(InputError, match=r"no \{text\}"):
        labels(model, Words(), EXAMPLES, template="Label:")
    with pytest.raises(InputError, match="'good', which is none of"):
        labels(model, Words(), EXAMPLES, ["bad", "fine"])


@pytest.mark.real
def test_smollm2_knows_a_good_review(smollm2: tuple[Any, Any]) -> None:
    how = TASKS["sentiment"]
    found = labels(*smollm2, sentences("sentiment", 12), how.labels, template=how.template)
    assert found.accuracy > 0.7
