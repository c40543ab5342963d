"""Tiny vision-language models of many families, each with its real processor, built in memory.

A picture goes through the processor's own tiling and the model's own encoder, whose attention is
silenced: then a token changes only where a pixel that it shows changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

from regard.zoo.tiny import HIDDEN, _decoder, _spread

TILE, PATCH = 32, 4  # pixels of a tile's side and of a patch's: 8 x 8 patches
SPECIAL = {
    "image_token": "<image>", "video_token": "<video>", "start_image_token": "<img>",
    "end_image_token": "</img>", "context_image_token": "<ctx>", "boi_token": "<boi>",
    "eoi_token": "<eoi>", "vision_bos_token": "<|vision_start|>", "vision_eos_token":
    "<|vision_end|>",
}  # fmt: skip
MARKS = [
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "[IMG]", "[IMG_BREAK]",
    "[IMG_END]", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
]  # fmt: skip
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "\n", "\n\n", "what", "is", "this"]
TABLE = {word: n for n, word in enumerate([*WORDS, *SPECIAL.values(), *MARKS])}
VOCABULARY = 128
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><image><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}"
)


def tokenizer() -> Any:
    """Words and line breaks; the marks of every family are tokens of their own."""
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel(TABLE, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL,
    )
    fast.add_special_tokens(
        {"additional_special_tokens": MARKS}, replace_extra_special_tokens=False
    )
    return fast


@contextlib.contextmanager
def without_video() -> Iterator[None]:
    """Processors of pictures that want a video processor too, which torchvision brings."""
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.processing_utils import ProcessorMixin

    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *a: None),
        mock.patch.object(processing_smolvlm, "num2words", str),
    ):
        yield


def _text(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_decoder(vocab_size=VOCABULARY, num_hidden_layers=2, **changes))


def _vision(kind: str, **changes: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": TILE, "patch_size": PATCH,
    }  # fmt: skip
    return getattr(transformers, kind)(**(settings | changes))


_SQUARE = {"height": TILE, "width": TILE}
_PINS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [TILE, 3 * TILE],
         [3 * TILE, TILE], [2 * TILE, 4 * TILE]]  # fmt: skip


def _llava() -> Any:
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    config = LlavaConfig(
        vision_config=_vision("CLIPVisionConfig"),
        text_config=_text(),
        image_token_index=TABLE["<image>"],
        image_seq_length=64,
        vision_feature_layer=-1,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size=_SQUARE)
    processor = LlavaProcessor(
        pictures,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_padded() -> Any:
    from transformers import LlavaImageProcessorPil

    model, processor = _llava()
    processor.image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size=_SQUARE, do_pad=True
    )
    return model, processor


def _llava_next() -> Any:
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    config = LlavaNextConfig(
        vision_config=_vision("CLIPVisionConfig"),
        text_config=_text(),
        image_token_index=TABLE["<image>"],
        image_seq_length=64,
        image_grid_pinpoints=_PINS,
        vision_feature_layer=-1,
    )
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size=_SQUARE, image_grid_pinpoints=_PINS
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _llava_onevision(most: str = "anyres_max_9") -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
    )

    config = LlavaOnevisionConfig(
        vision_config=_vision("SiglipVisionConfig", vision_use_head=False),
        text_config=_text(),
        image_token_id=TABLE["<image>"],
        video_token_id=TABLE["<video>"],
        image_grid_pinpoints=_PINS,
        vision_aspect_ratio=most,
        vision_feature_layer=-1,
    )
    pictures = LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_PINS)
    with without_video():
        processor = LlavaOnevisionProcessor(
            pictures,
            tokenizer(),
            None,
            num_image_tokens=64,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=most,
        )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _llava_onevision_scaled() -> Any:
    """More tiles than the model keeps: they are scaled down."""
    return _llava_onevision("anyres_max_2")


def _pixtral() -> Any:
    import transformers.utils
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralImageProcessorPil

    # the processor's module asks for torchvision, for something that is not used here
    with mock.patch.object(transformers.utils, "is_vision_available", lambda: False):
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    config = LlavaConfig(
        vision_config=_vision("PixtralVisionConfig", image_size=64, head_dim=16),
        text_config=_text(),
        image_token_index=TABLE["[IMG]"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pictures = PixtralImageProcessorPil(
        size={"longest_edge": 40}, patch_size={"height": PATCH, "width": PATCH}
    )
    processor = PixtralProcessor(pictures, tokenizer(), patch_size=PATCH)
    return LlavaForConditionalGeneration(config), processor


def _mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig

    _, processor = _pixtral()
    processor.spatial_merge_size = 2
    processor.image_processor.size = {"longest_edge": 64}
    config = Mistral3Config(
        vision_config=_vision("PixtralVisionConfig", image_size=64, head_dim=16),
        text_config=MistralConfig(
            **_decoder(vocab_size=VOCABULARY, num_hidden_layers=2), sliding_window=None
        ),
        image_token_index=TABLE["[IMG]"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Mistral3ForConditionalGeneration(config), processor


def _idefics3() -> Any:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    config = Idefics3Config(
        vision_config=_vision("Idefics3VisionConfig"),
        text_config=_text(pad_token_id=0),
        image_token_id=TABLE["<image>"],
        scale_factor=2,
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE}
    )
    processor = Idefics3Processor(pictures, tokenizer(), image_seq_len=16)
    return Idefics3ForConditionalGeneration(config), processor


def _smolvlm() -> Any:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
        SmolVLMProcessor,
    )

    config = SmolVLMConfig(
        vision_config=_vision("SmolVLMVisionConfig"),
        text_config=_text(pad_token_id=0),
        image_token_id=TABLE["<image>"],
        scale_factor=2,
    )
    pictures = SmolVLMImageProcessorPil(
        size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE}
    )
    with without_video():
        processor = SmolVLMProcessor(pictures, tokenizer(), None, image_seq_len=16)
    return SmolVLMForConditionalGeneration(config), processor


def _gemma3() -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        Gemma3TextConfig,
    )

    config = Gemma3Config(
        vision_config=_vision("SiglipVisionConfig", vision_use_head=False),
        text_config=Gemma3TextConfig(
            **_decoder(vocab_size=VOCABULARY, num_hidden_layers=2),
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=16,
        image_token_index=TABLE["<image>"],
        boi_token_index=TABLE["<boi>"],
        eoi_token_index=TABLE["<eoi>"],
    )
    pictures = Gemma3ImageProcessorPil(
        size=_SQUARE,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    processor = Gemma3Processor(pictures, tokenizer(), image_seq_length=16)
    return Gemma3ForConditionalGeneration(config), processor


def _internvl() -> Any:
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        Qwen2Config,
    )

    config = InternVLConfig(
        vision_config=_vision(
            "InternVLVisionConfig", image_size=[TILE, TILE], patch_size=[PATCH, PATCH]
        ),
        text_config=Qwen2Config(
            **{
                n: v
                for n, v in _decoder(vocab_size=VOCABULARY, num_hidden_layers=2).items()
                if n != "head_dim"
            }
        ),
        image_token_id=TABLE["<ctx>"],
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    pictures = GotOcr2ImageProcessorPil(size=_SQUARE, max_patches=6)
    with without_video():
        processor = InternVLProcessor(pictures, tokenizer(), None, image_seq_length=16)
    return InternVLForConditionalGeneration(config), processor


def _qwen(family: str) -> Any:
    import transformers
    from transformers import Qwen2VLImageProcessorPil

    from regard.zoo import tiny_vlm

    ids = {"image_token_id": "<image>", "video_token_id": "<video>"}
    ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {**tiny_vlm._QWEN_IDS, **{name: TABLE[word] for name, word in ids.items()}}
    if family == "qwen2_5_vl":
        text = tiny_vlm._decoder(without=["head_dim"], rope_parameters=tiny_vlm._ROPE)
        vision = {
            "depth": 2, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_heads": 4,
            "out_hidden_size": HIDDEN, "patch_size": PATCH, "window_size": 16,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "num_hidden_layers": 2}, vision_config=vision, **ids
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        name, settings = tiny_vlm._BUILT[family]
        text = {**settings["text_config"], "num_hidden_layers": 2}
        model = tiny_vlm._built(name, {**settings, **ids, "text_config": text}, 0)
    words = tokenizer()
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 1024, "longest_edge": 4096}
    )
    with without_video():
        processor = getattr(transformers, f"{kind}Processor")(
            pictures, words, None, chat_template=CHAT
        )
    return model, processor


BUILDERS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava padded": _llava_padded,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "llava_onevision scaled": _llava_onevision_scaled,
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
}


def family(name: str) -> tuple[Any, Any]:
    """A model and its processor; patches do not see each other in the encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = BUILDERS[name]()
        _spread(model)
    with torch.no_grad():
        for part in model.get_encoder(modality="image").modules():
            if type(part).__name__.endswith("Attention"):
                for out in ("out_proj", "o_proj", "proj", "projection_layer"):
                    if hasattr(part, out):
                        getattr(part, out).weight.zero_()
    return model.eval(), processor


def embedded(model: Any, inputs: Any) -> Tensor:
    """What enters the first layer of the language model, `[tokens, dim]`."""
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return seen[0][0]
