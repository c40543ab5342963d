"""The claims of Task-KV: run end to end on a tiny model, controls as described, judges that
judge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.lab import reproduce
from regard.lab.reproduce.harness import Journal, Setup
from regard.reach import Handler
from regard.shrink.task_kv import claims as own
from regard.zoo.tiny import tiny

from ..models import Words

IDS = torch.randint(3, 120, (1, 90), generator=torch.Generator().manual_seed(0))
QUICK = own.Size(2, 60, 1, 60, 2, 80, 16, 2, 4)


def setup(model: Any) -> Setup:
    return Setup(model, Words(), "tiny", True, Journal(None, {}), False)


def test_it_runs_on_a_tiny_model(tmp_path: Path) -> None:
    result = reproduce.run("task-kv", quick=True, model=(tiny("llama"), Words()), out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in own.CLAIMS]
    for claim in result.claims:
        assert claim.verdict in ("reproduced", "partly", "not reproduced", "needs scale")
        if claim.verdict != "needs scale":
            assert claim.here and claim.control and claim.values
    assert json.loads((tmp_path / "task-kv.quick.json").read_text())["seeds"]
    assert [f.name for f in tmp_path.iterdir()] == ["task-kv.quick.json"]


def test_one_reading_serves_every_method() -> None:
    """The loss after the shared reading is that of a method which reads the prompt itself."""
    model, text = tiny("llama"), own.Text(IDS[:, :70], IDS[:, 70:])
    seen = own._read(model, text.prompt)
    losses = []
    with own.quiet("Task-KV: "):
        for name, method in own._methods(QUICK).items():
            found = own._over(model, method, seen, text.tail)
            with torch.no_grad(), regard.apply(model, own._methods(QUICK)[name]):
                cache = model(text.prompt).past_key_values
                logits = [
                    model(text.tail[:, n : n + 1], past_key_values=cache).logits for n in range(19)
                ]
            assert found == pytest.approx(own._nats(torch.cat(logits, 1), text.tail), abs=1e-5)
            losses.append(found)
    assert losses[0] == pytest.approx(own._loss(model, text), abs=1e-5), "the full cache"
    assert len({round(x, 7) for x in losses}) > 10


def test_the_middle_is_exchanged_and_nothing_else() -> None:
    model = tiny("llama")
    kept = {}
    for name in ("Task-KV 0.4", "none", "recent", "drawn"):
        method = own._methods(QUICK)[name]
        with torch.no_grad(), regard.apply(model, method), pytest.warns(UserWarning):
            model(IDS)
        positions = method._found[0].groups[-1].positions
        assert positions is not None
        kept[name] = positions[0, 0].tolist()
    entries = int(0.4 * 90)
    assert len(kept["none"]) == 6 and {len(kept[n]) for n in kept} == {6, entries}
    assert kept["none"] == [0, 1, 86, 87, 88, 89]
    assert kept["recent"] == [0, 1, *range(90 - entries + 2, 90)]
    assert set(kept["none"]) < set(kept["drawn"]) and kept["drawn"] != kept["Task-KV 0.4"]


def test_silenced_heads_are_silent() -> None:
    model = tiny("llama")
    outs: list[torch.Tensor] = []

    class Outs(Handler):
        def after(self, call: Any, state: Any) -> None:
            outs.append(state.out)

    far, near, heads = own._ranked(model, IDS)
    assert heads == 4 and all(len(f) == len(n) == 1 and f != n for f, n in zip(far, near))
    with torch.no_grad(), regard.apply(model, own.Silent(dict(enumerate(far))), Outs()):
        model(IDS)
    for out, own_heads in zip(outs, far):
        silent = [h for h in range(4) if not bool(out[:, h].any())]
        assert silent == own_heads


def test_prompts() -> None:
    made = setup(tiny("llama"))
    for kind in own.KINDS:
        texts = list(own._texts(made, kind, 3, 80, 16))
        assert all(60 < t.prompt.shape[1] <= 80 and 4 <= t.tail.shape[1] <= 16 for t in texts)
        assert len({tuple(t.prompt[0].tolist()) for t in texts}) == 3
    (asked, *_) = own._texts(made, "summary", 1, 80, 0, ask=True)
    request = Words()(own.SUMMARISE)["input_ids"]
    assert asked.prompt[0, -len(request) :].tolist() == request


def test_facts_are_answered() -> None:
    import random

    prompt, answer = own._facts(random.Random(1), lambda words: len(words.split()), 150)
    for part in answer.strip(" .").split(", "):
        name, number = part.split(" has ")
        assert f"The badge number of {name} is {number}." in prompt
        assert name in prompt.split("Question:")[1]


BUDGET = {f"high_{m}_{r}": -0.1 for m in ("SnapKV", "StreamingLLM") for r in (0.4, 0.6)}
MAP = {"low": 0.1, "p": 0.01, **{f"gain_{k}": 0.1 for k in own.KINDS}}


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("task", MAP, "reproduced"),
        ("task", {**MAP, "gain_code": -0.1}, "partly"),
        ("task", {**MAP, "p": 0.06}, "partly"),
        ("task", {**MAP, "low": 0.0}, "not reproduced"),
        ("far-heads", {"far_random_low": 1, "random_near_low": 1, "far_near_low": 1}, "reproduced"),
        ("far-heads", {"far_random_low": -1, "random_near_low": 1, "far_near_low": 1}, "partly"),
        (
            "far-heads",
            {"far_random_low": 1, "random_near_low": -1, "far_near_low": -1},
            "not reproduced",
        ),
        ("budget", BUDGET, "reproduced"),
        ("budget", {**BUDGET, "high_SnapKV_0.6": 0.1}, "partly"),
        ("budget", {**BUDGET, "high_StreamingLLM_0.4": 0.1}, "not reproduced"),
        ("middle", {"high_none": -0.1, "high_recent": -0.1}, "reproduced"),
        ("middle", {"high_none": -0.1, "high_recent": 0.1}, "partly"),
        ("middle", {"high_none": 0.1, "high_recent": -0.1}, "not reproduced"),
        ("as-full", {"high_retrieval": 0.01, "high_summary": 0.04}, "reproduced"),
        ("as-full", {"high_retrieval": 0.9, "high_summary": 0.04}, "partly"),
        ("as-full", {"high_retrieval": 0.9, "high_summary": 0.06}, "not reproduced"),
    ],
)
def test_the_judges(key: str, values: dict[str, Any], said: str) -> None:
    claim = next(c for c in own.CLAIMS if c.key == key)
    assert claim.settle(values, here="", control="").verdict == said


def test_settling_made_up_numbers() -> None:
    """Differences and intervals come from the numbers given, in the right direction."""
    stated = {c.key: c for c in own.CLAIMS}
    alike = {k: [[[n], [n]]] * 3 for n, k in enumerate(own.KINDS)}
    claim = own._settle_map(stated["task"], alike)
    assert claim.values["within"] == 1 and claim.values["across"] == 0
    assert claim.verdict == "reproduced" and claim.values["p"] < 0.01
    same = {k: [[[0], [1]]] * 3 for k in own.KINDS}
    assert own._settle_map(stated["task"], same).verdict == "not reproduced"

    silent = {k: {"plain": [1.0], "far": [3.0], "random": [2.0], "near": [1.5]} for k in own.KINDS}
    claim = own._settle_silent(stated["far-heads"], silent)
    assert claim.verdict == "reproduced" and claim.values["far"] == 2.0
    assert claim.values["random_near_low"] == pytest.approx(0.5)

    names = [f"{m} {r}" for m in ("StreamingLLM", "SnapKV", "Random") for r in own.RATIOS]
    curve: dict[str, Any] = {k: {n: [3.0, 3.0] for n in names} for k in own.KINDS}
    for k in own.KINDS:
        curve[k] |= {f"Task-KV {r}": [2.0, 2.0] for r in own.RATIOS} | {"full": [1.99, 1.99]}
        curve[k] |= {"none": [2.5, 2.5], "recent": [2.1, 2.1], "drawn": [1.0, 1.0]}
    claim = own._settle_budget(stated["budget"], curve)
    assert claim.verdict == "reproduced" and claim.values["high_SnapKV_0.6"] == -1.0
    claim = own._settle_middle(stated["middle"], curve)
    assert claim.verdict == "reproduced" and claim.values["low_drawn"] == 1.0
    assert own._settle_full(stated["as-full"], curve).verdict == "reproduced"
