"""The tiny vision-language models: real classes, the same weights for the same seed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from regard.errors import InputError
from regard.zoo.tiny_vlm import VLMS, tiny_processor, tiny_vlm, vlm_inputs


@pytest.mark.parametrize("family", VLMS)
def test_every_family_runs(family: str) -> None:
    state = torch.get_rng_state()
    model, twin = tiny_vlm(family, layers=2), tiny_vlm(family, layers=2)
    other = tiny_vlm(family, seed=1, layers=2)
    assert torch.equal(torch.get_rng_state(), state)
    text = model.config.text_config
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    for images in ([1, 2], [0], [0, 1]):
        inputs = vlm_inputs(family, model, images=images)
        with torch.no_grad():
            logits = model(**inputs).logits
            assert torch.equal(logits, twin(**inputs).logits)
            assert not torch.equal(logits, other(**inputs).logits)
        assert logits.shape[:2] == inputs["input_ids"].shape


def test_the_picture_matters() -> None:
    for family in VLMS:
        model = tiny_vlm(family, layers=2)
        inputs = vlm_inputs(family, model, images=[1])
        with torch.no_grad():
            plain = model(**inputs).logits[0, -1]
            inputs["pixel_values"] = -inputs["pixel_values"]
            assert float((model(**inputs).logits[0, -1] - plain).abs().max()) > 1e-2


def test_the_processor_fits_the_model() -> None:
    model, processor = tiny_vlm("llava", layers=2), tiny_processor()
    pictures = [Image.new("RGB", (40, 30), c) for c in ("red", "blue")]
    inputs = processor(images=pictures, text="w5 <image> w6 <image> w7", return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 35)
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 35, 128)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="llava"):
        tiny_vlm("lava")
    with pytest.raises(InputError, match="no tiny processor"):
        tiny_processor("qwen2_vl")
