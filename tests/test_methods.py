"""The invariants of every method, a row each: read from the catalogue, never listed here."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import catalog
from regard.catalog import Method
from regard.errors import InputError

from .shrink.explicit import ids, wide

MEASURE = ("tokens", "answer")  # what such methods take they only look at
ROWS = [
    m
    for m in catalog.everything()
    if m.status == "available" and m.takes and m.takes not in MEASURE
]
IDS = [m.slug for m in ROWS]
SET = [m for m in catalog.everything() if m.settings is not None and m.status == "available"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A model of the kind that a method takes, and inputs for it: two rows of one length."""
    kind = request.param
    if kind == "text":
        body = wide().float()
        yield body, {"input_ids": ids(40, rows=2)}
    elif kind == "picture":
        from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs

        body = tiny_vlm("llava")
        yield body, vlm_inputs("llava", body)
    else:
        pytest.fail(f"say in this fixture how inputs of the kind {kind!r} are made")


def rows(*, needs: str = "") -> Any:
    chosen = [m for m in ROWS if not needs or getattr(m, needs)]
    return pytest.mark.parametrize(
        ("method", "model"), [(m, m.takes) for m in chosen], ids=[m.slug for m in chosen],
        indirect=["model"],
    )  # fmt: skip


def generated(model: Any, inputs: dict[str, Any], *methods: Any, tokens: int = 6) -> Any:
    with torch.no_grad(), regard.apply(model, *methods):
        return model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip


def logits(model: Any, inputs: dict[str, Any], *methods: Any) -> Tensor:
    with torch.no_grad(), regard.apply(model, *methods):
        out: Tensor = model(**inputs).logits
    return out


@rows(needs="neutral")
def test_neutral_settings_leave_the_model_as_it_is(method: Method, model: Any) -> None:
    body, inputs = model
    plain = generated(body, inputs)
    neutral = generated(body, inputs, method.run(**{**method.example, **method.neutral}))
    assert torch.equal(plain.sequences, neutral.sequences)
    for a, b in zip(plain.logits, neutral.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@rows()
def test_it_acts(method: Method, model: Any) -> None:
    """The settings of the card's example change what the model does: the other rows can fail."""
    body, inputs = model
    plain = torch.stack(generated(body, inputs).logits)
    changed = torch.stack(generated(body, inputs, method.run(**method.example)).logits)
    assert not torch.allclose(plain, changed, rtol=1e-3, atol=1e-4)


@rows()
def test_it_leaves_no_trace(method: Method, model: Any) -> None:
    body, inputs = model
    before = logits(body, inputs)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in body.modules())
    state, config = torch.get_rng_state(), copy.deepcopy(body.config.to_dict())
    generated(body, inputs, method.run(**method.example), tokens=2)
    with (
        pytest.raises(RuntimeError, match="stop"),
        regard.apply(body, method.run(**method.example)),
    ):
        raise RuntimeError("stop")
    assert torch.equal(before, logits(body, inputs))
    assert torch.equal(state, torch.get_rng_state())
    assert body.config.to_dict() == config
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in body.modules())


@rows(needs="plain_prompt")
def test_the_pass_over_the_prompt_is_plain(method: Method, model: Any) -> None:
    body, inputs = model
    changed = logits(body, inputs, method.run(**method.example))
    torch.testing.assert_close(changed, logits(body, inputs), rtol=1e-4, atol=1e-5)


@rows()
def test_a_batch_is_its_rows_alone(method: Method, model: Any) -> None:
    body, inputs = model
    together = torch.stack(generated(body, inputs, method.run(**method.example)).logits)
    for row in range(2):
        one = alone(inputs, row)
        single = torch.stack(generated(body, one, method.run(**method.example)).logits)
        torch.testing.assert_close(together[:, row], single[:, 0], rtol=1e-3, atol=1e-4)


def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch; pictures are shared out evenly among the rows."""
    count = len(inputs["input_ids"])
    return {
        name: x[row * (len(x) // count) : (row + 1) * (len(x) // count)]
        if torch.is_tensor(x)
        else x
        for name, x in inputs.items()
    }


@rows()
def test_it_runs_twice_alike(method: Method, model: Any) -> None:
    """What one run leaves in the object does not reach the next."""
    body, inputs = model
    one = method.run(**method.example)
    first = torch.stack(generated(body, inputs, one).logits)
    assert torch.equal(first, torch.stack(generated(body, inputs, one).logits))


@rows()
def test_it_reports_plain_data(method: Method, model: Any) -> None:
    body, inputs = model
    one = method.run(**method.example)
    generated(body, inputs, one)
    report = one.report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    if method.has("view"):
        for table in method.load("view").tables(report):
            assert all(len(row) == len(table["columns"]) for row in table["rows"])


@pytest.mark.parametrize("method", SET, ids=[m.slug for m in SET])
def test_saved_settings_are_loaded_settings(method: Method) -> None:
    one = method.settings(**{k: v for k, v in method.example.items() if k in fields(method)})
    saved = json.loads(json.dumps(one.settings()))
    again = method.settings(**saved)
    assert json.loads(json.dumps(again.settings())) == saved


@pytest.mark.parametrize("method", SET, ids=[m.slug for m in SET])
def test_settings_out_of_range_are_refused(method: Method) -> None:
    """Every number and word of the settings, one wrong value each."""
    example = {k: v for k, v in method.example.items() if k in fields(method)}
    tried = 0
    for name, one in fields(method).items():
        rule = one.metadata
        wrong: list[Any] = []
        if rule["among"]:
            wrong.append("no such word")
        wrong += [rule[n] - 1 for n in ("least",) if rule[n] is not None]
        wrong += [rule[n] for n in ("above", "below") if rule[n] is not None]
        wrong += [rule["to"] + 1] if rule["to"] is not None else []
        if wrong and not rule["among"]:
            wrong += [float("nan"), float("inf"), "many"]
        for value in wrong:
            tried += 1
            with pytest.raises(InputError, match=name):
                method.settings(**{**example, name: value})
    assert tried


def fields(method: Method) -> dict[str, Any]:
    return {n: f for n, f in method.settings.__dataclass_fields__.items() if f.metadata}
