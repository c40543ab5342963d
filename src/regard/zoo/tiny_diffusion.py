"""Tiny diffusion pipelines of the real classes: random weights, built in memory, no download.

Their images are noise; what they are for is the machinery: the very pipeline, text encoder and
denoiser classes that carry the full-size checkpoints, at a size that runs in a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from regard.errors import InputError, nearest
from regard.zoo.pipelines import need_diffusers

_SPOKEN = """
a an the and or of on in at with to left right above below beside between behind under over
side two three one is are red green blue yellow orange purple pink white black gray brown
circle square triangle star cross ring diamond heart small large big tiny striped dotted
plain background cat dog car sheep ball box photo picture sky grass floor wall
"""
WORDS: tuple[str, ...] = tuple(_SPOKEN.split())
"""Words that the tokenizers read as one token each; any other word falls into letters."""

LENGTH = 24  # tokens of a prompt
WIDTH = 32
IMAGE = 32  # pixels of an image's side unless told otherwise


def tiny_pipeline(kind: str = "sd", seed: int = 0) -> Any:
    """Build a small random pipeline: "sd" (`StableDiffusionPipeline`), "sdxl"
    (`StableDiffusionXLPipeline`), "sd3" (`StableDiffusion3Pipeline`) or "flux" (`FluxPipeline`).

    Float32 on the CPU, in eval mode, without progress bars; the same seed gives the same weights
    and the caller's random state is not touched. `save_pretrained` writes the usual folder.

    >>> pipe = tiny_pipeline("sd")
    >>> pipe("a red circle", num_inference_steps=2).images[0].size
    (32, 32)

    Raises:
        InputError: an unknown kind.
        ImportError: diffusers is not installed (`pip install "regard[diffusion]"`).
    """
    if kind not in _BUILDERS:
        raise InputError(f"There is no tiny pipeline {kind!r}.{nearest(kind, _BUILDERS)}")
    import torch

    need_diffusers()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        for part in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
            if part is not None:
                _spread(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _spread(denoiser: Any) -> None:
    """Make attention far from uniform, so that a wrong key or a lost mask would show."""
    import torch

    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if any(part in name for part in ("to_q.", "to_k.", "add_q_proj.", "add_k_proj.")):
                weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5) if weight.dim() > 1 else None


def clip_tokenizer(words: Sequence[str] = WORDS, length: int = LENGTH) -> Any:
    """A real `CLIPTokenizer` whose merges make one token of every given word."""
    from transformers import CLIPTokenizer

    bos, eos = "<|startoftext|>", "<|endoftext|>"
    vocab, merges = _merged(tuple(words))
    return CLIPTokenizer(
        vocab={**vocab, bos: len(vocab), eos: len(vocab) + 1},
        merges=list(merges),  # type: ignore[arg-type]
        bos_token=bos,
        eos_token=eos,
        unk_token=eos,
        pad_token=eos,
        model_max_length=length,
    )


@lru_cache(maxsize=4)
def _merged(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair merges learnt until every word is one piece; all single bytes are known too."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    trained.train_from_iterator([" ".join(words)], trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [piece + "</w>" for piece in pieces]
    known = dict.fromkeys(pieces)
    known |= dict.fromkeys(sorted(model["vocab"], key=model["vocab"].get))
    return {piece: n for n, piece in enumerate(known)}, [(a, b) for a, b in model["merges"]]


def t5_tokenizer(words: Sequence[str] = WORDS, length: int = LENGTH) -> Any:
    """A real `T5Tokenizer` with one piece for every given word and one for every letter."""
    from transformers import T5Tokenizer

    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    scores += [("▁" + word, -1.0) for word in dict.fromkeys(words)]
    scores += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz.,'-0123456789"]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=length)


def clip_text(
    tokenizer: Any, pooled: bool = False, width: int = WIDTH, layers: int = 2, inner: int = 2
) -> Any:
    """A CLIP text encoder for a tokenizer, `inner` times as wide inside its MLPs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)


def _t5(tokenizer: Any, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def _vae(channels: int, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        shift_factor=shift,
        sample_size=IMAGE,
    )


def _unet(text: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=text,
        **more,
    )


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _sd() -> Any:
    from diffusers import StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=clip_text(tokenizer, pooled=False),
        tokenizer=tokenizer,
        unet=_unet(WIDTH),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    unet = _unet(
        2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=clip_text(tokenizer, pooled=False),
        text_encoder_2=clip_text(tokenizer, pooled=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer, third = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=IMAGE,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift=0.1),
        text_encoder=clip_text(tokenizer, pooled=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer, pooled=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(third, 2 * WIDTH),
        tokenizer_3=third,
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, second = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift=0.1),
        text_encoder=clip_text(tokenizer, pooled=False),
        tokenizer=tokenizer,
        text_encoder_2=_t5(second, WIDTH),
        tokenizer_2=second,
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
}
PIPELINES: tuple[str, ...] = tuple(_BUILDERS)
"""Names that `tiny_pipeline` knows."""
