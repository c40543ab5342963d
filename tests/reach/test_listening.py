"""Words of real pipelines: templates, padding in front, encoders one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from regard.core import State
from regard.errors import InputError
from regard.reach import Call, Handler
from regard.reach.denoising import Prompts, denoising

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

import diffusers
import transformers

from regard.parts.diffusion.words import WordMaps
from regard.zoo import tiny_diffusion as tiny

from ..denoisers import CASES

PROMPT = "a red circle and a blue square"


def causal(tokenizer: Any, width: int) -> Any:
    """A language model as text encoder: it reads from left to right."""
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    return transformers.Qwen3Model(config)


def transformer(name: str, **changes: Any) -> Any:
    return getattr(diffusers, name)(**{**CASES[name].config, **changes})


def z_image() -> Any:
    tokenizer = tiny.clip_tokenizer(length=200)
    tokenizer.chat_template = "user : {{ messages[0]['content'] }} ; box :"
    return diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), tiny._vae(4, shift=0.1),
        causal(tokenizer, 16), tokenizer, transformer("ZImageTransformer2DModel"),
    )  # fmt: skip


def qwen_image() -> Any:
    tokenizer = tiny.clip_tokenizer(length=200)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, causal(tokenizer, 16), tokenizer,
        transformer("QwenImageTransformer2DModel"),
    )  # fmt: skip
    pipe.prompt_template_encode = "cat : {} ; box :"
    pipe.prompt_template_encode_start_idx = 3  # the start token and two more
    return pipe


def cogview4() -> Any:
    tokenizer = tiny.clip_tokenizer(length=200)
    return diffusers.CogView4Pipeline(
        tokenizer, causal(tokenizer, 16), tiny._vae(4, shift=0.1),
        transformer("CogView4Transformer2DModel"), diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def pixart() -> Any:
    tokenizer = tiny.t5_tokenizer()
    return diffusers.PixArtAlphaPipeline(
        tokenizer, tiny._t5(tokenizer, 16), tiny._vae(4),
        transformer("PixArtTransformer2DModel", out_channels=8),
        diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def hunyuan_dit() -> Any:
    first, second = tiny.clip_tokenizer(length=77), tiny.t5_tokenizer(length=256)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(first), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=77,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(  # an eighth of the picture: so the pipeline counts positions
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        vae=vae, text_encoder=encoder, tokenizer=first,
        transformer=transformer("HunyuanDiT2DModel", text_len=77, text_len_t5=256),
        scheduler=diffusers.DDPMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder_2=tiny._t5(second, 16), tokenizer_2=second,
    )  # fmt: skip


class Heard(Handler):
    """What a run says of its prompts, and the text as it reached the denoiser."""

    prompts: Prompts

    def sites(self, sites: list[Any]) -> list[Any]:
        return [s for s in sites if s.text]

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        assert place.prompts is not None and place.text is not None
        self.prompts = place.prompts
        self.steps = {*getattr(self, "steps", set()), place.step}
        self.driven = [*getattr(self, "driven", []), len(place.conditional)]
        self.room = place.text.stop - place.text.start


def run(pipe: Any, *handlers: Handler, prompt: Any = PROMPT, **kwargs: Any) -> Heard:
    heard = Heard()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    size = 16 * pipe.vae_scale_factor
    kwargs = {"num_inference_steps": 2, "height": size, "width": size} | kwargs
    with torch.no_grad(), regard.apply(pipe, heard, *handlers):
        pipe(prompt, output_type="latent", **kwargs)
    return heard


def of(heard: Heard, word: str, element: int = 0) -> list[int]:
    text = heard.prompts.text(element)
    return heard.prompts.columns(element, text.index(word), text.index(word) + len(word))


def embeds(pipe: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        out = pipe.encode_prompt(prompt=prompt, do_classifier_free_guidance=False)
    first = out[0]
    return first[0] if isinstance(first, (list, torch.Tensor)) else first


@pytest.mark.parametrize("make", [z_image, cogview4])
def test_a_causal_encoder_shows_where_a_word_stands(make: Any) -> None:
    """Before a changed word nothing changes, so its column is the first that does."""
    pipe = make()
    heard = run(pipe)
    one, two = embeds(pipe, PROMPT), embeds(pipe, PROMPT.replace("blue", "green"))
    first = int(((one - two).abs().amax(-1) > 1e-6).nonzero()[0])
    assert of(heard, "blue") == [first] and of(heard, "square") == [first + 1]
    assert heard.steps == {0, 1} and set(heard.driven) <= {0, 1} and 1 in heard.driven


def test_the_template_of_qwen_is_cut_off_in_front() -> None:
    pipe = qwen_image()
    heard = run(pipe, true_cfg_scale=4.0, negative_prompt="a star")
    with torch.no_grad():
        one, two = (
            pipe.encode_prompt(prompt=p)[0][0] for p in (PROMPT, PROMPT.replace("blue", "green"))
        )
    first = int(((one - two).abs().amax(-1) > 1e-6).nonzero()[0])
    assert of(heard, "blue") == [first] == [5] and of(heard, "red") == [1]
    # the prompt's forward, then the negative one's: the steps are two
    assert heard.driven == [1, 0, 1, 0] and heard.steps == {0, 1}


def test_prompts_of_different_lengths_have_their_own_columns() -> None:
    pipe, prompts = qwen_image(), [PROMPT, "a small blue star"]
    heard = run(pipe, maps := WordMaps(["blue", "star"]), prompt=list(prompts))
    assert of(heard, "blue", 0) == [5] and of(heard, "blue", 1) == [2]
    assert maps["blue"].shape[0] == 2 and bool(torch.isnan(maps["star"][0]).all())


def test_the_prompt_list_stays_as_it_was_given() -> None:
    """Z-Image writes its template into the list; words are those of the person."""
    heard = run(z_image(), maps := WordMaps(), prompt=[PROMPT])
    assert heard.prompts.texts == [PROMPT] and maps.names[:3] == ["a", "red", "circle"]


def test_one_tokenizer_after_the_other() -> None:
    """Hunyuan-DiT encodes with two encoders in two calls; a word has columns in both."""
    pipe = hunyuan_dit()
    heard = run(pipe, maps := WordMaps(["circle"]), use_resolution_binning=False)
    first = pipe.tokenizer(PROMPT).input_ids
    circle = pipe.tokenizer("circle", add_special_tokens=False).input_ids[0]
    second = pipe.tokenizer_2.convert_ids_to_tokens(pipe.tokenizer_2(PROMPT).input_ids)
    assert of(heard, "circle") == [first.index(circle), 77 + second.index("▁circle")]
    assert heard.room == 333 and maps["circle"].shape == (1, 8, 8)


def test_halves_are_told_by_their_text() -> None:
    """PixArt's pipeline does not say whether it guides; its texts do."""
    pipe = pixart()
    maps, guided = WordMaps(["circle"]), WordMaps(["circle"], steps=(0, 1))
    plain = WordMaps(["circle"], steps=(0, 1))
    common = {"use_resolution_binning": False, "max_sequence_length": 24}
    noise = torch.randn(1, 4, 16, 16)
    heard = run(pipe, maps, guided, latents=noise, **common)
    assert set(heard.driven) == {1} and of(heard, "circle") == [2]
    run(pipe, plain, latents=noise, guidance_scale=1.0, **common)
    assert torch.allclose(guided["circle"], plain["circle"], atol=1e-6)


def test_tokenizers_are_as_before() -> None:
    pipe = z_image()
    kind, prompt = type(pipe.tokenizer), [PROMPT]
    run(pipe, prompt=prompt)
    assert type(pipe.tokenizer) is kind and "encode_prompt" not in vars(pipe)
    ready = [embeds(pipe, PROMPT)]
    pipe.set_progress_bar_config(disable=True)
    maps, calls = WordMaps(["circle"]), {"num_inference_steps": 1, "height": 32, "width": 32}
    with regard.apply(pipe, maps), pytest.raises(InputError, match="prompt is not known"):
        pipe(prompt_embeds=ready, guidance_scale=0.0, **calls)
