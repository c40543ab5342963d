"""How `shapes-vlm` and `smol-vlm` are put together, saved and loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

SIDE, PATCH = 64, 8  # pixels of an image's side, and of a patch's
PLACEHOLDER = -7  # stands for an image token in rows of ids; negative, so that no word is like it
IMAGE = "<image>"
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE, "<unk>", "user", "assistant")
SHAPES_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} user "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% else %} assistant {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)
SMOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


@dataclass(frozen=True)
class Words:
    """How a tokenizer writes a conversation about one image.

    Attributes:
        prefix, after: token ids before the image, and between it and the question.
        assistant: ids between question and answer. end: the id after an answer.
        table: `[words + 1, pieces]`, the ids of every word of `questions.WORDS`, -1 behind; row 0
            is no word.
        processor: pictures and text -> inputs, saved beside the weights.
    """

    prefix: list[int]
    after: list[int]
    assistant: list[int]
    end: int
    table: Tensor
    processor: Any


def tower(patch: int = PATCH, width: int = 128, layers: int = 5, side: int = SIDE) -> Any:
    """An untrained vision tower of CLIP's kind; LLaVA reads the states before its last layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        projection_dim=width,
    )
    return CLIPVisionModel(config)


def pixels(images: Tensor) -> Tensor:
    """Images from 0 to 1 as the processors hand them over."""
    return 2 * images - 1


def assemble_shapes(
    vision: Any, *, hidden: int = 256, layers: int = 8, heads: int = 8, kv_heads: int = 4
) -> tuple[Any, Words]:
    """`shapes-vlm` before training, around a vision tower."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    words = shapes_words(vision.config.patch_size)
    text = LlamaConfig(
        vocab_size=len(words.processor.tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    _put_in(model, vision)
    return model, words


def shapes_words(patch: int = PATCH) -> Words:
    """The word tokenizer of `shapes-vlm` and its processor."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from regard.zoo.train.questions import WORDS

    vocabulary = {word: n for n, word in enumerate((*SPECIAL, *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )
    table = torch.full((len(WORDS) + 1, 1), -1)
    table[1:, 0] = torch.arange(len(SPECIAL), len(SPECIAL) + len(WORDS))
    return Words([1, 5], [], [6], 2, table, processor(tokenizer, patch, SHAPES_TEMPLATE))


def assemble_smol(
    vision: Any, body: str = "smollm2-135m", rank: int | None = 16, dtype: Any = None
) -> tuple[Any, Words]:
    """`smol-vlm` around a vision tower: SmolLM2 as it is, frozen; a new adapter where `rank` says
    so.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from regard import zoo

    language, tokenizer = zoo.load(body, dtype=dtype)
    words = smol_words(tokenizer, vision.config.patch_size, vision.config.image_size)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).to(language.dtype)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = 0  # the image's places are filled by features
    model.tie_weights()
    model.generation_config = language.generation_config
    _put_in(model, vision.to(language.dtype))
    if rank is not None:
        peft = _peft()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        wrapped = peft.get_peft_model(model.model.language_model, settings)
        model.model.language_model = wrapped
        for name, parameter in model.named_parameters():
            parts = ("lora_", "vision_tower", "multi_modal_projector")
            parameter.requires_grad_(any(part in name for part in parts))
    return model, words


def smol_words(tokenizer: Any, patch: int = PATCH, side: int = SIDE) -> Words:
    """How SmolLM2's tokenizer, with one more token for images, writes the conversation."""
    from regard.zoo.train.questions import WORDS

    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    pieces = [
        tokenizer(word if word in "?." else f" {word}", add_special_tokens=False).input_ids
        for word in WORDS
    ]
    table = torch.full((len(WORDS) + 1, max(map(len, pieces))), -1)
    for n, own in enumerate(pieces):
        table[n + 1, : len(own)] = torch.tensor(own)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Words(
        ids("<|im_start|>user\n"),
        [],
        ids("<|im_end|>\n<|im_start|>assistant\n"),
        end,
        table,
        processor(tokenizer, patch, SMOL_TEMPLATE, side),
    )


def processor(tokenizer: Any, patch: int, template: str, side: int = SIDE) -> Any:
    """Pictures scaled and cropped to the tower's size, and text."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save(name: str, model: Any, words: Words, folder: Path) -> None:
    """Write a model: all of it, or for `smol-vlm` what SmolLM2's package does not bring."""
    if name != "smol-vlm":
        model.save_pretrained(folder)
        words.processor.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    model.model.vision_tower.save_pretrained(folder / "tower")
    adapter = model.model.language_model
    adapter.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # names the place of the body
    projector = model.model.multi_modal_projector.state_dict()
    held = {n: t.detach().cpu().contiguous() for n, t in projector.items()}
    save_file(held, folder / "projector.safetensors", metadata={"format": "pt"})


def load_smol(folder: Path, dtype: Any = None, body: str = "smollm2-135m") -> tuple[Any, Any]:
    """`smol-vlm` and its processor: SmolLM2 from its package, the rest from the folder; the adapter
    is merged into the weights.

    Raises:
        InputError: SmolLM2's package is not installed, or the folder lacks a part.
        ImportError: peft is not installed.
    """
    from safetensors.torch import load_file
    from transformers import CLIPVisionModel

    for part in ("tower/config.json", "adapter/adapter_config.json", "projector.safetensors"):
        if not (folder / part).is_file():
            raise InputError(f"{folder} lacks {part}: install regard again, or train smol-vlm")
    peft = _peft()
    vision = CLIPVisionModel.from_pretrained(
        folder / "tower", dtype=torch.float32, use_safetensors=True
    )
    model, words = assemble_smol(vision, body, rank=None, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers renames
        wrapped = peft.PeftModel.from_pretrained(model.model.language_model, folder / "adapter")
        model.model.language_model = wrapped.merge_and_unload()
    model.tie_weights()
    projector = load_file(folder / "projector.safetensors")
    kind = model.dtype
    model.model.multi_modal_projector.load_state_dict({n: t.to(kind) for n, t in projector.items()})
    return model.eval().requires_grad_(False), words.processor


def _put_in(model: Any, vision: Any) -> None:
    """The trained tower, and a projector whose outputs are as long as words are."""
    model.model.vision_tower = vision
    projector = model.model.multi_modal_projector
    spread = float(model.get_input_embeddings().weight.detach().float().std())
    hidden = projector.linear_1.out_features
    with torch.no_grad():
        torch.nn.init.normal_(projector.linear_1.weight, std=projector.linear_1.in_features**-0.5)
        torch.nn.init.normal_(projector.linear_2.weight, std=1.3 * spread * hidden**-0.5)
        torch.nn.init.zeros_(projector.linear_1.bias)
        torch.nn.init.zeros_(projector.linear_2.bias)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError(
            'smol-vlm adapts SmolLM2 through PEFT: pip install "regard[steer]"'
        ) from None
    return peft
