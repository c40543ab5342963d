"""Questions about scenes: balanced, repeatable, and scored as greedy decoding scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from regard import watching as api
from regard import zoo
from regard.errors import InputError
from regard.lab.trials import vqa
from regard.shape.mma.method import MMA
from regard.shrink.visiondrop.method import VisionDrop
from regard.steer.var.method import VAR


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


@pytest.mark.parametrize(
    ("make", "new"),
    [
        (lambda: VAR(dims=[3, 40], tau=1.5, nonsink_ratio=0.2), 2),  # one alone is never a sink
        (lambda: VisionDrop(budget=24), 1),
        (lambda: MMA(marker=[6]), 1),  # "assistant"
    ],
    ids=["var", "visiondrop", "mma"],
)
def test_a_method_on_the_shipped_model(
    shapes: tuple[Any, Any], make: Callable[[], Any], new: int
) -> None:
    """It changes answers; a padded batch and cached steps give what one pass alone gives."""
    model, processor = shapes
    given = vqa.items(2, ["color", "relation"], seed=3)
    inputs = vqa.read(processor, given).inputs
    live, ids = inputs["attention_mask"], inputs["input_ids"]
    assert not bool(live.all())
    places = (live.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = model(**inputs, position_ids=places).logits[:, -1]
        with api.apply(model, make()):
            whole = model(**inputs, position_ids=places).logits[:, -1]
        assert float((whole - plain).abs().max()) > 1e-3
        for row, item in enumerate(given):
            with api.apply(model, make()):
                alone = model(**vqa.read(processor, [item]).inputs).logits[0, -1]
            assert torch.allclose(whole[row], alone, atol=1e-4)
        prompt = {"input_ids": ids[:, :-new], "attention_mask": live[:, :-new]}
        with api.apply(model, make()):
            out = model(**{**inputs, **prompt}, position_ids=places[:, :-new], use_cache=True)
            step = model(input_ids=ids[:, -new:], attention_mask=live,
                         position_ids=places[:, -new:],
                         past_key_values=out.past_key_values)  # fmt: skip
        assert torch.allclose(step.logits[:, -1], whole, atol=1e-4)
