"""Tiny vision-language models of the real architecture classes: random weights, built in memory.

>>> model = tiny_vlm("qwen2_vl", layers=2)
>>> type(model).__name__, model.config.text_config.num_key_value_heads
('Qwen2VLForConditionalGeneration', 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.errors import InputError, nearest

from .tiny import HIDDEN, VOCAB, _built, _decoder

SIDE = 4  # an image is SIDE x SIDE patches for the language model
PATCH = 4
IMAGE, VIDEO, VISION_START, VISION_END = 127, 126, 125, 124
LAYERS = 4


_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}
_LLAVA: dict[str, Any] = {
    "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": HIDDEN},
    "text_config": {"model_type": "llama", **_decoder()},
    "image_token_index": IMAGE,
    "image_seq_length": SIDE * SIDE,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_QWEN_VISION = {"depth": 2, "hidden_size": HIDDEN, "num_heads": 4, "patch_size": PATCH}
_SHAPES = [[1, 2], [2, 1], [2, 2]]  # of a LLaVA-NeXT image, in tiles
_BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaForConditionalGeneration", _LLAVA),
    "llava_siglip": (
        "LlavaForConditionalGeneration",
        {
            **_LLAVA,
            "vision_config": {
                **_VISION,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            "vision_feature_select_strategy": "full",
        },
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        {
            **_LLAVA,
            "image_grid_pinpoints": [[SIDE * PATCH * n for n in shape] for shape in _SHAPES],
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _decoder(without=["head_dim"], rope_parameters=_ROPE),
            "vision_config": {**_QWEN_VISION, "embed_dim": HIDDEN, "mlp_ratio": 2},
            **_QWEN_IDS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _decoder(rope_parameters={**_ROPE, "mrope_interleaved": True}),
            "vision_config": {
                **_QWEN_VISION,
                "intermediate_size": 2 * HIDDEN,
                "out_hidden_size": HIDDEN,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            **_QWEN_IDS,
        },
    ),
}

VLMS: tuple[str, ...] = tuple(_BUILT)
"""Names that `tiny_vlm` and `vlm_inputs` know. Every body has 4 query and 2 key heads."""


def tiny_vlm(family: str, seed: int = 0, layers: int = LAYERS) -> Any:
    """Build a small random vision-language model, in float32 on the CPU and in eval mode.

    The same seed gives the same weights, and the caller's random state is not touched.
    Raises InputError for a family that is not in `VLMS`.
    """
    if family not in _BUILT:
        raise InputError(f"There is no tiny model {family!r}.{nearest(family, VLMS)}")
    name, settings = _BUILT[family]
    text = {**settings["text_config"], "num_hidden_layers": layers}
    return _built(name, {**settings, "text_config": text}, seed)


def vlm_inputs(
    family: str,
    model: Any,
    images: Sequence[int] = (1, 1),
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Forward inputs, one row for every number of images in `images`: three words, the images, then
    `text` words; shorter rows are padded on the left.

    A LLaVA-NeXT image is SIDE x 2 SIDE patches in two tiles beside its base.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    rows, pixels = [], []
    side = SIDE * PATCH
    for count in images:
        row = _words(3, random)
        for _ in range(count):
            shown = SIDE * SIDE
            if family == "llava_next":
                shown += SIDE * (2 * SIDE + 1)
                pixels.append(torch.randn(3, 3, side, side, generator=random))
            elif family.startswith("qwen"):
                grid = (1, 2 * SIDE, 2 * SIDE)
                shape = (4 * SIDE * SIDE, 3 * 2 * PATCH * PATCH)
                pixels.append(torch.randn(*shape, generator=random))
            else:
                pixels.append(torch.randn(3, side, side, generator=random))
            row += [VISION_START] * family.startswith("qwen") + [IMAGE] * shown
            row += [VISION_END] * family.startswith("qwen")
        rows.append(row + _words(text, random))
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, longest - len(row) :] = torch.tensor(row)
        mask[n, longest - len(row) :] = 1
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if family.startswith("qwen"):
        made["mm_token_type_ids"] = (ids == IMAGE).int()
        if pixels:
            made["image_grid_thw"] = torch.tensor([grid] * len(pixels))
            made["pixel_values"] = torch.cat(pixels)
    elif pixels:
        made["pixel_values"] = torch.stack(pixels)
        if family == "llava_next":
            made["image_sizes"] = torch.tensor([[side, 2 * side]] * len(pixels))
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in made.items()}


def _words(count: int, random: Any) -> list[int]:
    import torch

    found: list[int] = torch.randint(3, min(VOCAB, VISION_END), (count,), generator=random).tolist()
    return found


def tiny_processor(family: str = "llava") -> Any:
    """A processor for a tiny model: words `w3` to `w123`, `<image>`, and pictures of its size.

    Saved beside the model it makes a checkpoint folder like that of a full-size one. Raises
    InputError for a family other than llava.

    >>> from PIL import Image
    >>> made = tiny_processor()(images=Image.new("RGB", (9, 9)), text="w5 <image> w7")
    >>> len(made["input_ids"][0])
    18
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    if family != "llava":
        raise InputError(f"There is no tiny processor {family!r}.{nearest(family, ['llava'])}")
    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, VOCAB))]
    words[IMAGE] = "<image>"
    table = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    side = SIDE * PATCH
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        pictures,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
