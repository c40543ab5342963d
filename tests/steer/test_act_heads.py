"""Head calibration: rerunning a suffix is rerunning the model, fits resume, files fit a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

import regard
from regard.errors import InputError
from regard.parts.labels import batches, label_tokens, margins
from regard.reach import Session
from regard.steer.act.heads import HeadFilter, _stack, _Suffix, choose, shape_of
from regard.steer.act.method import ACT
from regard.zoo.tiny import tiny

FIXED: dict[str, Any] = {"beta": 0.1, "threshold": 0.06, "skip_layers": (0, 0)}
PROMPTS = [f"{'so ' * (n % 3)}the {w} was long and the day {w} is" for n, w in enumerate("abcdefg")]
LABELS = ["good", "bad", "bad", "good", "bad", "good", "good"]


class Words:
    """One token a word."""

    def __call__(self, text: str, **_: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": [3 + sum(map(ord, w)) % 100 for w in text.split()]})


def full_margins(model: Any, methods: list[Any]) -> torch.Tensor:
    """Margins of every prompt from whole forwards, one prompt at a time."""
    names, found = ["bad", "good"], []
    tokens = label_tokens(Words(), names)
    with torch.no_grad(), regard.apply(model, *methods):
        for prompt, label in zip(PROMPTS, LABELS):
            ids = torch.tensor([Words()(prompt).input_ids])
            logits = model(ids).logits[:, -1][:, tokens]
            found.append(margins(logits, torch.tensor([names.index(label)])))
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_every_head_alone_is_a_full_rerun(family: str) -> None:
    model = tiny(family)
    found = HeadFilter(model, Words(), batch_size=3, **FIXED).fit(PROMPTS, LABELS)
    base = full_margins(model, [])
    assert found.baseline_["margin"] == pytest.approx(float(base.mean()), abs=1e-5)
    assert found.baseline_["accuracy"] == pytest.approx(float((base > 0).float().mean()))
    shape = shape_of(model)[0]
    assert len(found.scores_) == shape["heads"] * shape["layers"]
    moved = 0
    for record in found.scores_:
        at = record["layer"], record["head"]
        want = full_margins(model, [ACT(heads={at[0]: [at[1]]}, **FIXED)]) - base
        assert torch.allclose(torch.tensor(found.changes_[at]), want, atol=2e-5)
        assert record["margin"] == pytest.approx(float(want.mean()), abs=1e-5)
        moved += bool((want.abs() > 1e-4).any())
    assert moved > 2
    kept = {(r["layer"], r["head"]) for r in found.scores_ if r["margin"] > 0}
    assert {(n, h) for n, heads in found.heads_.items() for h in heads} == kept


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_the_suffix_is_run_alone(family: str) -> None:
    """Layers below are not called again, and the logits are the model's own."""
    model = tiny(family)
    _, inputs = next(batches(Words(), PROMPTS, 4))
    calls: list[int] = []
    with torch.no_grad(), Session(model):
        whole = model(**inputs).logits[:, -1]
        suffix = _Suffix(model, inputs, _stack(model, shape_of(model)[1][0]))
        assert suffix.direct and torch.allclose(suffix.logits, whole, atol=1e-6)
        suffix.enter(1)
        for n, layer in enumerate(suffix.layers):
            layer.register_forward_hook(lambda *_, n=n: calls.append(n))
        assert torch.equal(suffix.logits_from(1), suffix.logits)
        assert calls == [1]  # the layer alone: nothing was changed
        with Session(model, [method := ACT(heads={1: [0, 1, 2, 3]}, **FIXED)]):
            changed = suffix.logits_from(1)
        assert bool(method.found()[1].any()) and calls == [1, 1]
        with regard.apply(model, method):
            assert torch.allclose(changed, model(**inputs).logits[:, -1], atol=1e-5)
        with pytest.raises(ValueError, match="layer 1 was entered"):
            suffix.logits_from(0)


def test_a_family_that_does_more_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Suffix, "_tail", lambda self, hidden: self.logits + 1)
    model = tiny("llama")
    found = HeadFilter(model, Words(), **FIXED).fit(PROMPTS, LABELS)
    want = full_margins(model, [ACT(heads={0: [1]}, **FIXED)]) - full_margins(model, [])
    assert torch.allclose(torch.tensor(found.changes_[0, 1]), want, atol=2e-5)


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = tiny("llama"), tmp_path / "records.jsonl"
    whole = HeadFilter(model, Words(), **FIXED).fit(PROMPTS, LABELS)
    tried: list[tuple[int, int]] = []
    real = HeadFilter._try

    def stop(self: Any, states: Any, layer: int, head: int) -> Any:
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append((layer, head))
        return real(self, states, layer, head)

    monkeypatch.setattr(HeadFilter, "_try", stop)
    with pytest.raises(KeyboardInterrupt):
        HeadFilter(model, Words(), records=records, **FIXED).fit(PROMPTS, LABELS)
    assert len(records.read_text().splitlines()) == 1 + 5
    with records.open("a") as file:
        file.write('{"layer": 1, "he')  # cut off in the middle
    tried.clear()
    again = HeadFilter(model, Words(), records=records, **FIXED).fit(PROMPTS, LABELS)
    assert tried == [(1, 1), (1, 2), (1, 3)]
    assert again.heads_ == whole.heads_
    assert [r["layer"] for r in again.scores_] == [0, 0, 0, 0, 1, 1, 1, 1]
    tried.clear()
    other = HeadFilter(model, Words(), records=records, **{**FIXED, "beta": 0.2})
    with pytest.raises(KeyboardInterrupt):  # other settings: from the start
        other.fit(PROMPTS, LABELS)
    assert len(tried) == 5


def test_the_file_and_the_model_it_is_for(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "heads.json"
    records = tmp_path / "r.jsonl"
    found = HeadFilter(model, Words(), top_k=3, records=records, **FIXED).fit(PROMPTS, LABELS)
    assert sum(map(len, found.heads_.values())) == 3
    found.save(path)
    assert not records.exists()
    data = json.loads(path.read_text())
    assert data["model"] == {"name": data["model"]["name"], "layers": 2, "heads": 4}
    assert data["settings"]["beta"] == 0.1 and len(data["scores"]) == 8
    with torch.no_grad():
        outs = []
        for heads in (path, found.heads_):
            with regard.apply(model, ACT(heads=heads, **FIXED)):
                outs.append(model(torch.arange(20)[None]).logits)
    assert torch.equal(*outs)
    for change, said in (({"layers": 3}, "3 layers"), ({"heads": 8}, "8 heads a layer")):
        path.write_text(json.dumps({**data, "model": {**data["model"], **change}}))
        with (
            pytest.raises(InputError, match=f"heads.json was made for a model of {said}"),
            torch.no_grad(),
            regard.apply(model, ACT(heads=path, **FIXED)),
        ):
            model(torch.arange(20)[None])


def test_pooled_data_sets_keep_their_own_choices() -> None:
    model = tiny("llama")
    choices = [["bad", "good"], ["bad", "worse"], *[["bad", "good"]] * 5]
    found = HeadFilter(model, Words(), **FIXED).fit(PROMPTS, LABELS, choices)
    alone = HeadFilter(model, Words(), **FIXED).fit(PROMPTS, LABELS)
    same = [n for n in range(7) if n != 1]
    for at, change in alone.changes_.items():
        assert [found.changes_[at][n] for n in same] == pytest.approx([change[n] for n in same])
    with pytest.raises(InputError, match="not among its choices"):
        HeadFilter(model, Words(), **FIXED).fit(PROMPTS, LABELS, [["bad", "worse"], *choices[1:]])


def test_choose() -> None:
    scores = [
        {"layer": 3, "head": 1, "margin": 0.2, "accuracy": 0.0},
        {"layer": 2, "head": 5, "margin": -0.1, "accuracy": 0.1},
        {"layer": 2, "head": 0, "margin": 0.3, "accuracy": -0.1},
    ]
    assert choose(scores) == {2: [0], 3: [1]}
    assert choose(scores, by="accuracy") == {2: [5]}
    assert choose(scores, least=0.25) == {2: [0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "loss"}, "margin, accuracy"),
        ({"top_k": 0}, "top_k"),
        ({"batch_size": 0}, "batch_size"),
        ({"beta": 2.0}, "beta"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeadFilter(tiny("llama"), Words(), **settings)


def test_data_that_does_not_fit() -> None:
    fit = HeadFilter(tiny("llama"), Words(), **FIXED).fit
    with pytest.raises(InputError, match="calibration set is empty"):
        fit([], [])
    with pytest.raises(InputError, match="7 prompts but 2 labels"):
        fit(PROMPTS, LABELS[:2])
    with pytest.raises(InputError, match="at least two labels"):
        fit(PROMPTS, ["good"] * 7)
    with pytest.raises(InputError, match="begin with the same token"):
        fit(PROMPTS, ["ab", "ba", *["ab"] * 5])
    with pytest.raises(InputError, match="leaves none of the 2 layers"):
        HeadFilter(tiny("llama"), Words(), skip_layers=(1, 9)).fit(PROMPTS, LABELS)
    for family, said in (("bert", "does not answer texts"), ("t5", "in an encoder")):
        with pytest.raises(InputError, match=said):
            HeadFilter(tiny(family), Words())
