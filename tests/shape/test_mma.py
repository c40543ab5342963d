"""MMA: both forms are the dense mask; leaks, decoding, turns, gradients, training, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import regard
from regard.errors import InputError, ReachError
from regard.shape.mma.method import MMA
from regard.shape.mma.roles import Roles, mma_mask
from regard.zoo.tiny import tiny
from regard.zoo.tiny_vlm import IMAGE, tiny_vlm, vlm_inputs

from ..vlms import alone, cast

FAMILIES = ["llava", "qwen2_vl", "qwen3_vl"]
ASK, SAY = (101, 102), (103,)  # role tokens of user and assistant
SET: dict[str, Any] = {"marker": SAY, "user": ASK}


def conversation(family: str, model: Any, images: list[int], answer: int = 4) -> dict[str, Any]:
    """Role tokens in the text after the images: `... question [103] answer`."""
    inputs = vlm_inputs(family, model, images=images, text=6 + 1 + answer)
    ids = inputs["input_ids"]
    ids[(ids >= 101) & (ids <= 103)] = 50
    ids[:, -answer - 1] = SAY[0]
    labels = ids.clone()
    labels[:, :-answer] = -100
    inputs["labels"] = labels
    return inputs


def allowed(ids: Tensor, live: Tensor, s: MMA) -> Tensor:
    """The card's mask, cell by cell."""
    batch, count = ids.shape
    mask = torch.zeros(batch, count, count, dtype=torch.bool)
    for b in range(batch):
        row, answer, turn, turns, inside = ids[b].tolist(), [], 0, [], False
        for t in range(count):
            if row[t : t + len(ASK)] == list(ASK) and inside:
                turn, inside = turn + 1, False
            if row[t] == SAY[0]:
                inside = True
            answer.append(inside)
            turns.append(turn)
        for i in range(count):
            for j in range(count):
                seen = j <= i
                apart = (turns[i] == turns[j]) if s.turns == "first" else (turns[i] <= turns[j])
                if row[i] == IMAGE and row[j] != IMAGE and not answer[j] and apart:
                    seen = True
                both = s.mutual == "both" and row[j] == IMAGE and row[i] != IMAGE
                if both and not answer[i] and turns[i] == turns[j]:
                    seen = True
                mask[b, i, j] = seen and bool(live[b, j])
    return mask


def dense(model: Any, inputs: dict[str, Any], mask: Tensor) -> Any:
    """The model with the test's own eager attention under this mask in its language model."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if id(module) in own:
            scores = scores.masked_fill(~mask[:, None], -1e30)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("dense_mma", attention)
    AttentionMaskInterface.register("dense_mma", eager_mask)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("dense_mma")
    own = {id(layer.self_attn) for layer in twin.get_decoder().layers}
    return twin(**inputs), twin


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mutual", ["image_to_text", "both"])
@pytest.mark.parametrize("form", ["merge", "mask", "own attention"])
def test_both_forms_are_the_dense_mask(family: str, mutual: str, form: str) -> None:
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        model = tiny_vlm(family, layers=3).to(dtype)
        inputs = cast(conversation(family, model, [1, 2, 0]), dtype)
        method = MMA(mutual=mutual, form="merge" if form == "merge" else "mask", **SET)
        live = inputs["attention_mask"].bool()
        with torch.no_grad():
            true, _ = dense(model, inputs, allowed(inputs["input_ids"], live, method))
            plain = model(**inputs).logits
            where = method.on(model) if form == "own attention" else regard.apply(model, method)
            with where:
                found = model(**inputs)
        size = max(float(true.logits[live].abs().max()), 1)
        assert float((found.logits - true.logits)[live].abs().max()) < bar * size
        assert float((found.logits - plain)[:2][live[:2]].abs().max()) > 1e-3
        # the row without an image keeps its logits to rounding
        assert float((found.logits - plain)[2][live[2]].abs().max()) < bar * size
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    "how",
    # compiling takes half a minute
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],
)
def test_every_attention_of_transformers_takes_the_mask(how: str) -> None:
    model = tiny_vlm("llava", layers=2)
    inputs = conversation("llava", model, [1, 2])
    live = inputs["attention_mask"].bool()
    with torch.no_grad():
        with regard.apply(model, MMA(**SET)):
            merged = model(**inputs).logits
        model.set_attn_implementation(how)
        with MMA(form="mask", **SET).on(model):
            assert float((model(**inputs).logits - merged)[live].abs().max()) < 2e-5


def turns_of(model: Any) -> dict[str, Any]:
    """Two turns, an image in each, then an answer: all in one row."""
    make = torch.Generator().manual_seed(4)

    def words(n: int) -> list[int]:
        found: list[int] = torch.randint(3, 90, (n,), generator=make).tolist()
        return found

    row = [*ASK, *words(2), *[IMAGE] * 16, *words(4), *SAY, *words(3)]
    row += [*ASK, *words(1), *[IMAGE] * 16, *words(3), *SAY, *words(3)]
    ids = torch.tensor([row])
    pixels = torch.randn(2, 3, 16, 16, generator=make, dtype=model.dtype)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("turns", ["first", "all"])
def test_several_turns(turns: str) -> None:
    model = tiny_vlm("llava", layers=3).double()
    inputs = turns_of(model)
    method = MMA(turns=turns, **SET)
    live = inputs["attention_mask"].bool()
    with torch.no_grad():
        true, _ = dense(model, inputs, allowed(inputs["input_ids"], live, method))
        for form in ("merge", "mask"):
            with regard.apply(model, MMA(turns=turns, form=form, **SET)):
                assert torch.allclose(model(**inputs).logits, true.logits, atol=1e-9)
    image = inputs["input_ids"] == IMAGE
    roles = method.roles(inputs["input_ids"], image, live)
    count = image.shape[1]
    seen = mma_mask(roles, turns).cells(count, count)[0, 0]
    assert torch.equal(seen, allowed(inputs["input_ids"], live, method)[0])


def test_a_new_turn_goes_on_with_the_cache() -> None:
    """Turn by turn with a cache is the whole conversation at once, when images see their turn."""
    model = tiny_vlm("llava", layers=3).double()
    inputs = turns_of(model)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    cut = ids[0].tolist().index(SAY[0]) + 1  # the prompt of the first turn, role token included
    for form in ("merge", "mask"):
        with torch.no_grad(), regard.apply(model, MMA(form=form, **SET)):
            whole = model(**inputs).logits
            out = model(input_ids=ids[:, :cut], pixel_values=pixels[:1], use_cache=True)
            parts = [out.logits]
            for t in range(cut, cut + 3):
                out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values)
                parts.append(out.logits)
            out = model(
                input_ids=ids[:, cut + 3 :],
                pixel_values=pixels[1:],
                past_key_values=out.past_key_values,
            )
            parts.append(out.logits)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)


def states(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return torch.stack(out.hidden_states)[:, inputs["input_ids"] == IMAGE]


@pytest.mark.parametrize("form", ["merge", "mask"])
def test_the_image_sees_the_question_and_never_the_answer(form: str) -> None:
    model = tiny_vlm("llava", layers=3)
    inputs = conversation("llava", model, [1])
    other_question, other_answer = copy.deepcopy(inputs), copy.deepcopy(inputs)
    other_question["input_ids"][0, -8] += 1
    other_answer["input_ids"][0, -3] += 1
    other_answer["labels"][0, -3] += 1
    plain = states(model, inputs)
    assert torch.equal(plain, states(model, other_question))
    for settings in (SET, {"marker": SAY}, {}):  # by marker, or by labels alone
        with regard.apply(model, MMA(form=form, **settings)):
            base = states(model, inputs)
            assert float((base - states(model, other_question))[1:].abs().max()) > 1e-3
            assert torch.equal(base, states(model, other_answer))
    # the test can fail: with no word on where the answer is, it is part of the prompt
    with regard.apply(model, MMA(form=form)):
        bare = [{n: x for n, x in i.items() if n != "labels"} for i in (inputs, other_answer)]
        assert float((states(model, bare[0]) - states(model, bare[1]))[1:].abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_alone(family: str) -> None:
    model, images = tiny_vlm(family, layers=3).double(), [1, 2, 0]
    inputs = cast(conversation(family, model, images), torch.float64)
    mask = inputs["attention_mask"]
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "llava" in family else {}
    for form in ("merge", "mask"):
        with torch.no_grad(), regard.apply(model, MMA(form=form, **SET)):
            together = model(**inputs, **extra).logits
            for row in range(3):
                own = model(**alone(family, inputs, row, images)).logits
                assert torch.allclose(together[row, -own.shape[1] :], own[0], atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(family: str) -> None:
    model = tiny_vlm(family, layers=3)
    model.generation_config.eos_token_id = None
    inputs = conversation(family, model, [1, 2])
    prompt = {
        n: x[:, :-4] if n in ("input_ids", "attention_mask", "mm_token_type_ids") else x
        for n, x in inputs.items()
        if n != "labels"
    }
    answers = []
    for method in (MMA(**SET), MMA(form="mask", **SET), MMA()):
        with torch.no_grad(), regard.apply(model, method):
            answers.append(model.generate(**prompt, max_new_tokens=5, do_sample=False))
            assert model.generate(**prompt, max_new_tokens=3, num_beams=2).shape[0] == 2
    with torch.no_grad(), MMA(form="mask", **SET).on(model):
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), answers[0])
        whole = {**prompt, "input_ids": answers[0]}
        longer = torch.ones(2, 5, dtype=torch.long)
        whole["attention_mask"] = torch.cat([prompt["attention_mask"], longer], 1)
        if "llava" in family:
            whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        else:
            whole["mm_token_type_ids"] = (answers[0] == IMAGE).int()
        again = model(**whole).logits[:, -6:-1].argmax(-1)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(again, answers[0][:, -5:])
    assert torch.equal(answers[0][:, :-5], answers[2][:, :-5])


def test_neutral() -> None:
    model = tiny_vlm("llava")
    inputs = conversation("llava", model, [1, 0])
    text = vlm_inputs("llava", model, images=[0])
    with torch.no_grad():
        plain, words = model(**inputs).logits, model(**text).logits
        for form in ("merge", "mask"):
            with regard.apply(model, MMA(layers=[], form=form, **SET)):
                assert torch.equal(model(**inputs).logits, plain)
            with regard.apply(model, MMA(form=form)):
                assert torch.equal(model(**text).logits, words)
    only = {"input_ids": inputs["input_ids"][:, :19], "pixel_values": inputs["pixel_values"]}
    only = {"input_ids": only["input_ids"][:1], "pixel_values": only["pixel_values"]}
    with torch.no_grad():
        causal = model(**only).logits
    with torch.no_grad(), regard.apply(model, MMA()), pytest.warns(UserWarning, match="no quest"):
        assert torch.equal(model(**only).logits, causal)


def test_a_subset_of_layers() -> None:
    model = tiny_vlm("llava", layers=3).double()
    inputs = cast(conversation("llava", model, [1]), torch.float64)
    found = []
    for form in ("merge", "mask"):
        with regard.apply(model, MMA(layers=[1], form=form, **SET)):
            found.append(states(model, inputs))
    plain = states(model, inputs)
    assert torch.allclose(found[0], found[1], atol=1e-10)
    assert torch.equal(found[0][1], plain[1])
    assert float((found[0][2] - plain[2]).abs().max()) > 1e-3


def test_a_second_one_is_refused_however_it_gets_there() -> None:
    model = tiny_vlm("llava")
    inputs = conversation("llava", model, [1, 1])
    one, other, mask = MMA(**SET), MMA(**SET), MMA(**SET, form="mask")
    with (
        pytest.raises(InputError, match="acts on layer 0 already"),
        regard.apply(model, one, other),
    ):
        pass
    for outer, inner in ((regard.apply(model, one), other), (mask.on(model), one)):
        with outer, pytest.raises(InputError, match="already"), regard.apply(model, inner):
            pass
    with regard.apply(model, one), pytest.raises(InputError, match="already"), mask.on(model):
        pass
    halves = [MMA(**SET, layers=[0, 1]), MMA(**SET, layers=[2, 3])]
    with torch.no_grad():
        with regard.apply(model, one):
            whole = model(**inputs).logits
        with regard.apply(model, *halves):
            assert torch.equal(model(**inputs).logits, whole)


def test_the_released_rule_opens_the_role_token() -> None:
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, 7, 103, 8]])
    image, live = ids == IMAGE, torch.ones(1, 7, dtype=torch.bool)
    paper = MMA(marker=103).roles(ids, image, live)
    code = MMA(marker=103, variant="released").roles(ids, image, live)
    assert paper.question[0].tolist() == [1, 0, 0, 1, 1, 0, 0]
    assert code.question[0].tolist() == [1, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_gradients_are_those_of_the_dense_mask(family: str) -> None:
    model = tiny_vlm(family, layers=2).double()
    inputs = cast(conversation(family, model, [1, 1]), torch.float64)
    live = inputs["attention_mask"].bool()
    true, twin = dense(model, inputs, allowed(inputs["input_ids"], live, MMA(**SET)))
    true.loss.backward()
    for method, own in ((MMA(**SET), False), (MMA(form="mask", **SET), False),
                        (MMA(form="mask", **SET), True)):  # fmt: skip
        model.zero_grad()
        with method.on(model) if own else regard.apply(model, method):
            model(**inputs).loss.backward()
        checked = 0
        for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters()):
            if b.grad is not None:
                assert a.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-9), name
                checked += 1
        assert checked > 40


def test_it_trains_with_the_ordinary_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny_vlm("llava", layers=2)
    inputs = conversation("llava", model, [1, 1])
    rows = [{n: x[r] for n, x in inputs.items()} for r in range(2)] * 2
    before = sum(p.numel() for p in model.parameters())
    settings = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=12, learning_rate=3e-3, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    with MMA(form="mask", **SET).on(model):
        trainer = transformers.Trainer(model, settings, train_dataset=rows)
        trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.5 * losses[0]
    assert before == sum(p.numel() for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def prefix(model: Any, cut: int, method: MMA) -> tuple[Any, dict[str, Any]]:
    inputs = conversation("llava", model, [1])
    ids = inputs["input_ids"]
    return model(
        input_ids=ids[:, :cut], pixel_values=inputs["pixel_values"], use_cache=True
    ).past_key_values, inputs


def test_a_prefix_cache_across_questions_is_refused() -> None:
    model = tiny_vlm("llava")
    count = 3 + 16
    with torch.no_grad(), regard.apply(model, method := MMA(**SET)):
        cache, inputs = prefix(model, 26, method)
        ids = inputs["input_ids"]
        cache.crop(-(26 - count))
        with pytest.raises(InputError, match="cut inside the question"):
            model(input_ids=ids[:, count:26], past_key_values=cache)
    with torch.no_grad(), regard.apply(model, MMA()):
        with pytest.warns(UserWarning, match="no question"):
            cache, _ = prefix(model, count, method)
        with pytest.raises(InputError, match="before its question was complete"):
            model(input_ids=ids[:, count:26], past_key_values=cache)
    with torch.no_grad():
        cache, _ = prefix(model, 26, method)
        with (
            regard.apply(model, MMA(**SET)),
            pytest.raises(InputError, match="not the last one"),
        ):
            model(input_ids=ids[:, 26:], past_key_values=cache)
    # answers may be cut back
    with torch.no_grad(), regard.apply(model, method):
        cache, _ = prefix(model, 26, method)
        one = model(input_ids=ids[:, 26:27], past_key_values=cache).logits
        cache.crop(-1)
        assert torch.allclose(
            model(input_ids=ids[:, 26:27], past_key_values=cache).logits, one, atol=1e-6
        )


def test_mistakes() -> None:
    model = tiny_vlm("llava")
    inputs = conversation("llava", model, [1])
    absent = regard.apply(model, MMA(marker=[104, 105]))
    with torch.no_grad(), absent, pytest.raises(InputError, match="no assistant marker"):
        model(**inputs)
    wrong = copy.deepcopy(inputs)
    wrong["labels"][0, -7] = 9
    with torch.no_grad(), regard.apply(model, MMA(**SET)):
        with pytest.raises(InputError, match="labels before"):
            model(**wrong)
        with pytest.raises(InputError, match="differ in shape"):
            model(**{**inputs, "labels": inputs["labels"][:, :-1]})
        packed = torch.cat([torch.arange(10), torch.arange(20)])[None]
        with pytest.raises(InputError, match="pack"):
            model(
                input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"],
                position_ids=packed,
            )  # fmt: skip
    with pytest.raises(InputError, match="no images"), regard.apply(tiny("llama"), MMA()):
        pass
    with pytest.raises(InputError, match='form="mask"'), MMA().on(model):
        pass
    with pytest.raises(InputError, match="layer 9"), regard.apply(model, MMA(layers=[9])):
        pass
    for settings, message in (
        ({"turns": "some"}, "turns is one of"),
        ({"marker": []}, "marker is empty"),
        ({"user": 3}, "give marker"),
        ({"variant": "released"}, "role token"),
        ({"rule": "released_code"}, "role token"),
    ):
        with pytest.raises(InputError, match=message):
            MMA(**settings)
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    method = MMA(form="mask", **SET)
    with torch.no_grad(), method.on(model), pytest.raises(ReachError, match="ignores masks"):
        model(**inputs)


def test_roles_draw() -> None:
    image = torch.tensor([[0, 1, 0, 0]])
    question = torch.tensor([[1, 0, 1, 0]])
    roles = Roles(image, question, torch.tensor([[False, False, False, True]]))
    assert mma_mask(roles).area(4, 4) == 11
