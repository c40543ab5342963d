"""Where the images are: spans, patches, grids, several images, and inputs that do not match."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.parts.decoding.picks import over, put, take_queries
from regard.parts.vision import decoder, has_class_token, locate
from regard.zoo.tiny import tiny
from regard.zoo.tiny_vlm import IMAGE, VLMS, tiny_vlm, vlm_inputs


@pytest.mark.parametrize("family", VLMS)
def test_images_of_every_family(family: str) -> None:
    model = tiny_vlm(family, layers=2)
    inputs = vlm_inputs(family, model, images=[1, 2, 0])
    found = locate(model, inputs)
    assert torch.equal(found.number >= 0, inputs["input_ids"] == IMAGE)
    assert [len(row) for row in found.grids] == [1, 2, 0] and found.count == 3
    assert all(g == (4, 4) for row in found.grids for g in row)
    assert torch.equal(found.live, inputs["attention_mask"].bool())
    for row in range(3):
        for n, (a, b) in enumerate(found.spans(row)):
            assert bool((found.number[row, a:b] == n).all())
            patches = found.patch[row, a:b]
            shown = patches[patches >= 0].tolist()
            # LLaVA-NeXT: 4 x 4 of the whole, then 4 rows of 8 and a separator
            assert shown == list(range(16 + 32 if family == "llava_next" else 16))
            assert int((patches < 0).sum()) == (4 if family == "llava_next" else 0)
    assert decoder(model, "it") is model.get_decoder()
    assert has_class_token(model) == (family in ("llava", "llava_next"))


def test_what_the_encoder_gave_tells_the_same_as_the_sizes() -> None:
    """`generate` encodes the images first and leaves their sizes out."""
    for family in ("llava_next", "qwen2_vl", "llava"):
        model = tiny_vlm(family, layers=2)
        inputs = vlm_inputs(family, model, images=[2])
        sizes = {n: x for n, x in inputs.items() if "ids" not in n and "mask" not in n}
        with torch.no_grad():
            out = model.model.get_image_features(**sizes, return_dict=True)
        ids = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": out}}
        a, b = locate(model, inputs), locate(model, ids)
        assert torch.equal(a.number, b.number) and torch.equal(a.patch, b.patch)


def test_a_tiled_image_of_another_shape() -> None:
    """The separators are where the model puts its newline, whatever is cut off."""
    model = tiny_vlm("llava_next", layers=2)
    inputs = vlm_inputs("llava_next", model, images=[1])
    size = torch.tensor([[10, 29]])  # best fits 16 x 32, of which a strip is padding
    with torch.no_grad():
        out = model.model.get_image_features(
            inputs["pixel_values"], image_sizes=size, return_dict=True
        )
    feature = out.pooler_output[0]
    ids = torch.cat([torch.tensor([5]), torch.full((len(feature),), IMAGE)])[None]
    found = locate(
        model, {"input_ids": ids, "pixel_values": inputs["pixel_values"], "image_sizes": size}
    )
    newline = (feature == model.model.image_newline).all(-1)
    assert torch.equal(found.patch[0, 1:] < 0, newline) and int(newline.sum()) > 1


def test_a_video_counts_as_one_image() -> None:
    model = tiny_vlm("qwen2_vl", layers=2)
    ids = torch.tensor([[5, 125, *[126] * 8, 124, 6]])
    pixels = torch.zeros(32, 96)
    given = {"input_ids": ids, "pixel_values_videos": pixels}
    found = locate(model, {**given, "video_grid_thw": torch.tensor([[2, 4, 4]])})
    assert found.grids == [[(2, 2, 2)]] and found.spans(0) == [(2, 10)]


def test_an_image_token_without_pixels_is_text() -> None:
    model = tiny_vlm("llava", layers=2)
    assert locate(model, {"input_ids": torch.tensor([[3, IMAGE, 4]])}).count == 0


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_mismatches(family: str) -> None:
    model = tiny_vlm(family, layers=2)
    inputs = vlm_inputs(family, model, images=[1])
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 4
    inputs["input_ids"][0, 5:9] = IMAGE
    with pytest.raises(InputError, match="4 image tokens"):
        locate(model, inputs)
    with pytest.raises(InputError, match="input_ids"):
        locate(model, {"inputs_embeds": torch.zeros(1, 3, 64)})
    with pytest.raises(InputError, match="reads no images"):
        decoder(tiny("llama"), "it")


def test_picked_queries_and_keys_are_the_dense_rows() -> None:
    from regard.core import Mask
    from regard.core.kernels.reference import attend
    from regard.reach import Call, Site

    make = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    q, k, v = noise(2, 4, 21, 8), noise(2, 2, 33, 8), noise(2, 2, 33, 8)
    rows, keys = (torch.rand(2, n, generator=make) < 0.4 for n in (21, 33))
    keys[1] = False
    mask = Mask.causal() & Mask.padding(torch.arange(33)[None] >= torch.tensor([[0], [5]]))
    call = Call(Site(0, "x", 0, "x", "self"), q, k, v, mask, 8**-0.5)
    few, places, ok = take_queries(call, rows)
    state = over(few, keys)
    dense = Mask.dense(mask.cells(21, 33) & keys[:, None, None])
    out, lse = attend(q, k, v, dense, 8**-0.5, None, None)
    blank = torch.zeros_like(q)
    assert torch.allclose(put(blank, state.out, places, ok), out * rows[:, None, :, None])
    got = put(torch.full_like(lse, 7.0), state.lse, places, ok)
    assert torch.allclose(got, lse.masked_fill(~rows[:, None], 7.0))
    # a single query, as in decoding
    one = call.change(q=q[:, :, -1:], mask=mask)
    assert torch.allclose(over(one, keys).out, out[:, :, -1:])
