"""The frame of trials: shared passes, journals, refusals, floors."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard import catalog
from regard.errors import InputError
from regard.lab.journal import Journal
from regard.lab.trials import configurations, frame
from regard.lab.trials.configurations import read
from regard.lab.trials.frame import Batch, Floor, Values, run
from regard.lab.trials.perplexity import batches
from regard.reach import Call, Handler
from regard.zoo.tiny import tiny

from .words import Words

TEXT = " ".join(f"{w}{n % 17}" for n in range(150) for w in ("some", "words", "of", "a", "text"))
EVERY = (
    "act:skip_layers=0/0,threshold=0.06,act:beta=1+snapkv:window=8,task-kv:sinks=2,recent=4,"
    "recycled-attention:stride=3,streaming-llm,snapkv:window=8,h2o,random"
)


class Spoil(Handler):
    """A stand-in: multiplies v by a factor; warns; refuses long prompts."""

    def __init__(self, factor: float = 1.0, refuse: int | None = None) -> None:
        self.factor, self.refuse = factor, refuse

    def before(self, call: Call) -> Call:
        if self.refuse is not None and call.q.shape[2] > self.refuse:
            raise InputError("the prompt is too long for Spoil")
        return call.change(v=call.v * self.factor)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    known = configurations.known()
    card = replace(known["act"].card, slug="spoil", method="Spoil")
    known["spoil"] = Own(card, __name__, Path())
    monkeypatch.setattr(configurations, "known", lambda: known)


class Own(catalog.Method):
    """A method of this file, without settings in its card."""

    settings = None  # type: ignore[assignment]

    def load(self, file: str = "method") -> Any:
        return sys.modules[__name__]


def _scores(found: frame.Scores, key: str) -> list[float]:
    return [v["nll"] for _, v in sorted(found.values[key]["text"].items())]


def test_a_shared_pass_gives_what_each_method_gives_alone() -> None:
    model, tokenizer = tiny("llama"), Words()
    own = batches(model, tokenizer, TEXT, context=61, continuation=7, documents=3, batch_size=2)
    every = read(EVERY, ratios=[0.5])
    found = run(model, every, own, show=False)
    assert not found.refused and set(found.values) == {c.key for c in every}
    for one in every:
        alone = run(model, [*read(""), *([one] if one.parts else [])], own, show=False)
        assert alone.values[one.key] == found.values[one.key]
    scores = {key: _scores(found, key) for key in found.values}
    snapkv, neutral = "snapkv:window=8@0.5", "act:beta=1+snapkv:window=8@0.5"
    assert scores.pop(neutral) == scores[snapkv]
    assert len({tuple(v) for v in scores.values()}) == len(scores)  # no method is another one
    full = found.values["full"]["text"][0]
    for key, tasks in found.values.items():
        one = tasks["text"][0]
        if key.startswith(("streaming", "snapkv", "h2o", "random", "task")):
            assert one["held"] <= 0.5 * full["held"] and one["read"] < full["read"]
        elif key.startswith("recycled"):
            assert one["held"] > full["held"] and one["read"] < full["read"]
        elif key.startswith("act:skip"):
            assert (one["held"], one["read"]) == (full["held"], full["read"])
    assert full["read"] == pytest.approx(61 + 4)
    assert full["held"] == 2 * 61 * 2 * 2 * 16 * 4  # layers, tokens, k and v, heads, dim, bytes


def test_neutral_methods_equal_the_plain_model(spoil: None) -> None:
    model = tiny("llama")
    own = batches(model, Words(), TEXT, context=40, continuation=5, documents=2)
    line = "act:beta=1,spoil:factor=1,task-kv:ratio=1,h2o:ratio=1,recycled-attention:stride=1"
    found = run(model, read(line), own, show=False)
    for key in found.values:
        assert _scores(found, key) == _scores(found, "full"), key
    before = [p.clone() for p in model.parameters()]
    spoiled = run(model, read("spoil:factor=0.5"), own, show=False)
    assert _scores(spoiled, "spoil:factor=0.5") != _scores(spoiled, "full")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), regard.apply(model, Spoil(0.5)):
        inside = model(ids).logits
    assert not torch.equal(inside, model(ids).logits)


def test_batch_is_alone() -> None:
    model = tiny("llama")
    fixed: dict[str, Any] = {"context": 33, "continuation": 6, "documents": 3}
    line = read("task-kv:sinks=2,recent=4,snapkv:window=4,recycled-attention", ratios=[0.5])
    together = run(model, line, batches(model, Words(), TEXT, **fixed), show=False)
    single = run(model, line, batches(model, Words(), TEXT, **fixed, batch_size=1), show=False)
    for key in together.values:
        assert _scores(together, key) == pytest.approx(_scores(single, key), abs=1e-5)


def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: None
) -> None:
    model, out = tiny("llama"), tmp_path / "out.json"
    own = batches(model, Words(), TEXT, context=30, continuation=4, documents=4, batch_size=2)
    line = read("spoil:factor=0.5,h2o", ratios=[0.5])
    whole = run(model, line, own, show=False)
    calls: list[str] = []
    plain = frame._measure

    def counted(*args: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[2].key)
        return plain(*args)

    monkeypatch.setattr(frame, "_measure", counted)
    key = {"model": "llama", "size": (1, 2)}
    with pytest.raises(KeyboardInterrupt), Journal.beside(out, key) as journal:
        run(model, line, own, journal=journal, show=False)
    assert [p.name for p in tmp_path.iterdir()] == [".out.json.partial.json"]
    calls.clear()
    calls.append("")  # room for two more before the next interruption
    with pytest.raises(KeyboardInterrupt), Journal.beside(out, key) as journal:
        run(model, line, own, journal=journal, show=False)
    monkeypatch.setattr(frame, "_measure", plain)
    with Journal.beside(out, key) as journal:
        assert len(journal.parts) == 5 and journal.spent > 0
        found = run(model, line, own, journal=journal, show=False)
        assert found.values == whole.values
        journal.clear()
    assert not list(tmp_path.iterdir())


def test_changed_code_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, journal = tiny("llama"), Journal(None, {})
    own = batches(model, Words(), TEXT, context=20, continuation=2, documents=1)
    line = read("h2o:ratio=0.5")
    run(model, line, own, journal=journal, show=False)
    for cell in journal.parts.values():
        cell["values"][0]["nll"] = -1.0
    assert _scores(run(model, line, own, journal=journal, show=False), line[1].key) == [-1.0]
    journal.parts["h2o:ratio=0.5/text/0"]["source"] = "older"
    found = run(model, line, own, journal=journal, show=False)
    assert _scores(found, line[1].key)[0] > 0 and _scores(found, "full") == [-1.0]


def test_refusals_and_notes_are_kept(spoil: None) -> None:
    model = tiny("llama")
    own = batches(model, Words(), TEXT, context=40, continuation=3, documents=1)
    greedy = "task-kv:ratio=0.05,sinks=30,recent=4"  # more sinks than the budget holds
    found = run(model, read(f"spoil:refuse=10,{greedy},h2o:ratio=0.5"), own, show=False)
    assert found.refused["spoil:refuse=10"] == {"text": "the prompt is too long for Spoil"}
    assert "too few" in found.refused[greedy]["text"]
    assert set(found.values) == {"full", "h2o:ratio=0.5"}  # the pass they shared failed for one
    low = read("task-kv:sinks=2,recent=4,h2o", ratios=[0.3])  # too little for one full head
    notes = run(model, low, own, show=False).notes
    assert len(notes["task-kv:sinks=2,recent=4@0.3"]) == 1
    assert notes["task-kv:sinks=2,recent=4@0.3"][0].startswith("Task-KV")
    assert not notes["h2o@0.3"] and not notes["full"]
    both = run(model, read("task-kv:sinks=2,recent=4", ratios=[0.3, 0.8]), own, show=False).notes
    assert both["task-kv:sinks=2,recent=4@0.3"] == notes["task-kv:sinks=2,recent=4@0.3"]
    assert not both["task-kv:sinks=2,recent=4@0.8"]  # each of a shared pass has its own
    with pytest.raises(InputError, match="beta"):
        run(model, read("act:beta=2"), own, show=False)


def _constant(task: str, number: int, value: float, asked: list[str]) -> Batch:
    def measure(model: Any, cache: Any) -> list[Values]:
        asked.append(f"{task}/{number}")
        return [{"recall": value}]

    return Batch(task, (number,), torch.arange(3, 15)[None], measure)


@pytest.mark.parametrize("skip", [False, True])
def test_a_low_ceiling_is_marked(skip: bool) -> None:
    asked: list[str] = []
    own = [_constant("hard", 0, 0.0, asked), _constant("hard", 1, 0.5, asked),
           _constant("fair", 0, 0.3, asked), _constant("fair", 1, 0.3, asked)]  # fmt: skip
    found = run(tiny("llama"), read("h2o:ratio=0.5"), own, floor=Floor("recall", 0.3),
                skip_low=skip, show=False)  # fmt: skip
    assert found.low == ["hard"] and found.skipped == (["hard"] if skip else [])
    assert asked.count("hard/0") == (1 if skip else 2) and asked.count("fair/1") == 2


def test_other_peoples_warnings_go_their_way() -> None:
    with pytest.warns(UserWarning, match="theirs"), frame._notes() as notes:
        warnings.warn("theirs", stacklevel=1)
    assert notes == []
