"""What words look at in a picture: equal to the explicit maps, under generate too, and no trace."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.errors import InputError
from regard.parts.pictures import PictureLooks
from regard.parts.vision import locate
from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "llava_siglip"])
def test_looks_are_columns_of_the_maps(family: str) -> None:
    model = tiny_vlm(family)
    inputs = vlm_inputs(family, model, images=[1])
    looks = PictureLooks()
    with torch.no_grad():
        before = model(**inputs).logits
        with regard.apply(model, looks):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, before)
        eager = tiny_vlm(family)
        eager.set_attn_implementation("eager")
        maps = eager(**inputs, output_attentions=True).attentions
    places = locate(model, inputs)
    patches = (places.patch[0] >= 0).nonzero()[:, 0]
    start = places.spans(0)[0][1]
    assert looks.tokens == inputs["input_ids"][0, start:].tolist()
    for layer, true in enumerate(maps):
        part = true[0][:, start:][:, :, patches]
        assert torch.allclose(looks.words[layer], part.mean(0), atol=1e-5)
        assert torch.allclose(looks.heads[layer], part.mean(1), atol=1e-5)
    assert looks.mass().shape == (len(maps), maps[0].shape[1])


def test_generated_words_are_those_of_one_pass() -> None:
    model = tiny_vlm("llava")
    inputs = vlm_inputs("llava", model, images=[1])
    settings = {"do_sample": False, "eos_token_id": None}
    with torch.no_grad(), regard.apply(model, live := PictureLooks()):
        out = model.generate(**inputs, max_new_tokens=4, **settings)
    whole = {**inputs, "input_ids": out[:, :-1], "attention_mask": torch.ones_like(out[:, :-1])}
    with torch.no_grad(), regard.apply(model, once := PictureLooks()):
        model(**whole)
    assert live.tokens == once.tokens
    assert torch.allclose(live.by_word(), once.by_word(), atol=1e-5)


@pytest.mark.parametrize("images", [[0], [1, 1]])
def test_one_conversation_with_a_picture(images: list[int]) -> None:
    model = tiny_vlm("llava")
    given = vlm_inputs("llava", model, images=images)
    says = pytest.raises(InputError, match="one conversation with a picture")
    with says, torch.no_grad(), regard.apply(model, PictureLooks()):
        model(**given)
