"""Tiny models of the real architecture classes: random weights, built in memory, no download.

They are for tests and experiments: every family is the very class that carries the full-size
checkpoint, so what works here meets the same code there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from regard.errors import InputError, nearest

VOCAB = 128
IMAGE_TOKEN = 127  # the id that stands for one image patch in the tiny Llava
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
LAYERS = 2
WINDOW = 8
IMAGE_SIZE = 8
PATCH = 4
MEL_BINS = 8
AUDIO_POSITIONS = 16


_SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT: dict[str, Any] = {"vocab_size": VOCAB, **_SHAPE, **_ENDS}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _decoder(without: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """The settings that the Llama-like configurations share, with changes laid over them."""
    grouped = {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    settings = {**_TEXT, **grouped, "max_position_embeddings": 4096, **changes}
    return {name: value for name, value in settings.items() if name not in without}


_BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _decoder()),
    "mistral": ("MistralForCausalLM", _decoder(sliding_window=WINDOW)),
    # the width of a head is derived from the hidden size
    "qwen2": ("Qwen2ForCausalLM", _decoder(without=["head_dim"])),
    "qwen3": ("Qwen3ForCausalLM", _decoder()),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _decoder(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=HIDDEN,
            decoder_sparse_step=1,
        ),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        _decoder(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        _decoder(
            attn_logit_softcapping=5.0,  # far below the usual 50, so that tiny scores meet it
            final_logit_softcapping=10.0,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=WINDOW,
            layer_types=[_LOCAL, _GLOBAL],
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        _decoder(
            num_hidden_layers=3,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=WINDOW,
            layer_types=[_LOCAL, _LOCAL, _GLOBAL],
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        _decoder(
            intermediate_size=HIDDEN,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=[_LOCAL, _GLOBAL],
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 1024,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            **_ENDS,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _decoder(without=["num_key_value_heads", "head_dim"])),
    "bert": (
        "BertModel",
        {"vocab_size": VOCAB, **_SHAPE, "max_position_embeddings": 512, "pad_token_id": 0},
    ),
    "vit": ("ViTModel", {**_SHAPE, "image_size": 4 * PATCH, "patch_size": PATCH}),
    "clip_text": (
        "CLIPTextModel",
        {**_TEXT, "max_position_embeddings": 77, "projection_dim": HIDDEN},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": HEAD_DIM,
            "d_ff": 2 * HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 32,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "num_mel_bins": MEL_BINS,
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 2 * HIDDEN,
            "decoder_ffn_dim": 2 * HIDDEN,
            "max_source_positions": AUDIO_POSITIONS,
            "max_target_positions": 64,
            **_ENDS,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": {
                "model_type": "clip_vision_model",
                **_SHAPE,
                "projection_dim": HIDDEN,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH,
            },
            "text_config": {"model_type": "llama", **_decoder()},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": (IMAGE_SIZE // PATCH) ** 2,
        },
    ),
}
"""Classes of transformers by family, and the settings of their configurations."""

FAMILIES: tuple[str, ...] = tuple(_BUILT)
"""Names that `tiny` and `inputs` know."""

CAUSAL_LMS: tuple[str, ...] = FAMILIES[: FAMILIES.index("bert")]
"""The families that are plain decoders of text, with a cache and `generate`."""


def tiny(family: str, seed: int = 0) -> Any:
    """Build a small random model of the family, in float32 on the CPU and in eval mode.

    The same seed gives the same weights, and the caller's random state is not touched.
    Raises InputError for a family that is not in `FAMILIES`.

    >>> model = tiny("llama")
    >>> model.config.num_attention_heads, model.config.num_key_value_heads, model.training
    (4, 2, False)
    """
    if family not in _BUILT:
        raise InputError(f"There is no tiny model {family!r}.{nearest(family, FAMILIES)}")
    return _built(*_BUILT[family], seed)


def _built(name: str, settings: dict[str, Any], seed: int) -> Any:
    """A random model of a class of transformers."""
    import torch
    import transformers

    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(kind.config_class(**copy.deepcopy(settings)))
        _spread(model)
    return model.eval()


def _spread(model: Any) -> None:
    """Draw weights large enough that attention is far from uniform, as in a trained model.

    The usual initial scale of 0.02 gives nearly equal attention everywhere, and with it a wrong
    mask or a missing head would hardly show.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:  # fixed sinusoids and the like
                continue
            if weight.dim() >= 2:
                inward = 0 if ".c_" in name else -1  # GPT-2 keeps its weights transposed
                weight.normal_(0.0, weight.shape[inward] ** -0.5)
                if any(part in name for part in ("q_proj", "query", "c_attn")):
                    weight.mul_(2.0)
            elif "q_norm" in name:
                weight.add_(1.0)  # doubles the query for Qwen's w and for Gemma's 1 + w alike
            elif name.endswith("sinks"):
                weight.normal_(0.0, 1.0)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1)


def inputs(
    family: str,
    model: Any,
    batch: int = 2,
    length: int = 12,
    seed: int = 0,
    *,
    padding: int = 0,
    side: str = "left",
) -> dict[str, Any]:
    """Return valid forward inputs for a model of `tiny`, on its device.

    Text goes in as `input_ids` and `attention_mask` [batch, length]; images as `pixel_values`
    [batch, 3, height, width]; sound as `input_features` [batch, mel bins, frames]. Encoder-decoders
    also get `decoder_input_ids`, two tokens shorter than `length` so that the two lengths differ.
    With padding > 0 the first row has that many masked tokens on the named side. Ids never are the
    padding, start or end token, so families that look for those see none by accident.

    >>> batch = inputs("llama", tiny("llama"), batch=2, length=5)
    >>> batch["input_ids"].shape
    torch.Size([2, 5])
    """
    import torch

    if family not in _BUILT:
        raise InputError(f"There is no tiny model {family!r}.{nearest(family, FAMILIES)}")
    if side not in ("left", "right"):
        raise InputError(f"side is 'left' or 'right', not {side!r}.")
    if not 0 <= padding < length:
        raise InputError(f"padding is at least 0 and less than the length, not {padding}.")
    random = torch.Generator().manual_seed(seed)

    def ids(tokens: int) -> Any:
        return torch.randint(3, IMAGE_TOKEN, (batch, tokens), generator=random)

    def noise(*shape: int) -> Any:
        return torch.randn(batch, *shape, generator=random)

    made: dict[str, Any] = {}
    if family == "vit":
        made["pixel_values"] = noise(3, 4 * PATCH, 4 * PATCH)
    elif family == "whisper":
        # Two frames make one position of the encoder.
        made["input_features"] = noise(MEL_BINS, 2 * AUDIO_POSITIONS)
        made["decoder_input_ids"] = ids(length)
    else:
        made["input_ids"] = ids(length)
        made["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        if padding:
            span = slice(0, padding) if side == "left" else slice(length - padding, length)
            made["attention_mask"][0, span] = 0
            made["input_ids"][0, span] = 0
        if family == "t5":
            made["decoder_input_ids"] = ids(max(1, length - 2))
        if family == "llava":
            patches = (IMAGE_SIZE // PATCH) ** 2
            start = 1 + (padding if side == "left" else 0)
            if length < patches + 2 + padding:
                raise InputError(
                    f"llava needs a length of at least {patches + 2 + padding} for its image."
                )
            made["input_ids"][:, start : start + patches] = IMAGE_TOKEN
            made["pixel_values"] = noise(3, IMAGE_SIZE, IMAGE_SIZE)
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in made.items()}
