"""Questions about scenes: balanced, repeatable, and scored as greedy decoding scores them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard import api, zoo
from regard.errors import InputError
from regard.steer.var import VAR
from regard.trials import vqa


@pytest.fixture(scope="module")
def shapes() -> tuple[Any, Any]:
    return zoo.load("shapes-vlm")


def test_items_are_the_same_again_and_of_their_kind() -> None:
    given = vqa.items(6, ["existence", "relation"], seed=4)
    again = vqa.items(6, ["existence", "relation"], seed=4)
    assert [(i.question, i.answer) for i in given] == [(i.question, i.answer) for i in again]
    assert [i.kind for i in given] == ["existence"] * 6 + ["relation"] * 6
    assert {i.answer for i in given} == {"yes", "no"}
    with pytest.raises(InputError, match="kinds are"):
        vqa.items(1, ["smell"])


def test_right_is_what_generate_writes(shapes: tuple[Any, Any]) -> None:
    model, processor = shapes
    given = vqa.items(5, ["color", "neighbour", "count"], seed=2, held_out=False)
    scores = vqa.score(model, processor, given, batch_size=7)
    for item, one in zip(given, scores):
        question = item.question.replace(" ?", "?")
        said = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(images=item.picture, text=text, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        written = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert one["right"] == float(written.startswith(item.answer)), (written, item)


def test_the_shipped_model_answers(shapes: tuple[Any, Any]) -> None:
    """On new scenes of pairs that it was trained on; the card states the figures."""
    model, processor = shapes
    given = vqa.items(40, ["color", "count"], seed=5, held_out=False)
    found = vqa.summary(given, vqa.score(model, processor, given))
    assert found["color"]["right"] > 0.85 and found["count"]["right"] > 0.9
    low, high = found["all"]["interval"]
    assert low <= found["all"]["right"] <= high and found["all"]["asked"] == 80


def test_a_neutral_method_changes_nothing(shapes: tuple[Any, Any]) -> None:
    model, processor = shapes
    given = vqa.items(4, ["existence"], seed=1)
    plain = vqa.score(model, processor, given)
    idle = VAR(move=0.0, dims=[0], tau=5.0)
    same = vqa.score(model, processor, given, lambda: api.apply(model, idle))
    for a, b in zip(plain, same):
        assert a["right"] == b["right"]
        assert a["log_probability"] == pytest.approx(b["log_probability"], abs=1e-4)
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-4)
