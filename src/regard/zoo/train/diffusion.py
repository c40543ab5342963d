"""Recipes of `shapes-sd` and `shapes-dit`: small pipelines of the real classes on drawn scenes.

64 x 64 pixels, an autoencoder of factor 4 that both share, words of one token each. `shapes-sd` is
the whole `StableDiffusionPipeline` (causal CLIP text encoder, UNet with cross-attention at 16, 8
and 4, DDIM); `shapes-dit` the `StableDiffusion3Pipeline` without T5 (two CLIPs, joint attention
over 256 image tokens, rectified flow). Pairs of colour and shape that `scenes.is_held_out` names
are never drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import InputError
from regard.zoo.pipelines import load_pipeline
from regard.zoo.tiny_diffusion import clip_tokenizer

from . import captions
from .drawing import Drawn, sample
from .loop import earlier, finish, half, save_folder, train

SIDE, LATENT, CHANNELS, LENGTH = 64, 16, 8, 32
TRAINED_STEPS = 1000
STEPS, GUIDANCE = 25, 4.0  # of the images that are judged
BLANKS = (0, 32, 256)  # empty T5 tokens in shapes-dit; the stock pipeline puts 256


def autoencoder(shift: float | None = None) -> Any:
    """The untrained autoencoder, factor 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=SIDE,
        shift_factor=0.0 if shift is None else shift,
    )


def train_vae(
    out: Path,
    *,
    minutes: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
    batch: int = 128,
    rate: float = 2e-3,
    steps: int | None = None,
    checked: int = 200,
) -> dict[str, Any]:
    """Train the autoencoder that both pipelines use; its scaling factor is measured at the end."""
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    vae = autoencoder().to(device)
    vae.to(memory_format=torch.channels_last)

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 3), textures=0.2)
        images = 2 * drawn.images(SIDE) - 1
        with half(device):
            told = vae.encode(images).latent_dist
            again = vae.decode(told.sample()).sample.float()
        return _apart(again, images) + 1e-6 * told.kl().float().mean()

    record = train("shapes-vae", loss_of, [{"params": list(vae.parameters())}], samples=batch,
                   minutes=minutes, rate=rate, steps=steps, device=device, decay=0.998)  # fmt: skip
    vae.eval()
    with torch.no_grad():
        drawn = sample(512, device=device, generator=make, things=(1, 2, 3))
        means = torch.cat([vae.encode(2 * x - 1).latent_dist.mean
                           for x in drawn.images(SIDE).split(128)])  # fmt: skip
        vae.register_to_config(scaling_factor=float(1 / means.std()))
    record |= {"seed": seed, "batch": batch, "rate": rate}
    return _passing(vae, out, record, checked)


def train_decoder(
    out: Path,
    *,
    minutes: float = 1.5,
    device: str = "cpu",
    seed: int = 9,
    vae: Path | None = None,
    batch: int = 160,
    rate: float = 1.5e-3,
    steps: int | None = None,
    checked: int = 200,
) -> dict[str, Any]:
    """Train the decoder on while the encoder stays: latents, and what was trained on them, keep
    their meaning. `vae` is the folder of an autoencoder, such as `vae` in a pipeline's.
    """
    coder = _coder(vae, device).to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    trained = [p.requires_grad_() for p in _parameters(coder.decoder, coder.post_quant_conv)]

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 3), textures=0.15)
        images = 2 * drawn.images(SIDE) - 1
        with half(device):
            with torch.no_grad():
                told = coder.encode(images).latent_dist.mean
                told = told + 0.03 * torch.randn(told.shape, device=device, generator=make)
            again = coder.decode(told).sample.float()
        return _apart(again, images)

    record = train("shapes-decoder", loss_of, [{"params": trained}], samples=batch,
                   minutes=minutes, rate=rate, steps=steps, device=device, decay=0.998)  # fmt: skip
    record |= {"seed": seed, "batch": batch, "rate": rate}
    return _passing(coder, out, record, checked)


def _apart(again: Tensor, images: Tensor) -> Tensor:
    """How far images are from those they were made of."""
    return F.l1_loss(again, images) + 0.5 * F.mse_loss(again, images)


def _passing(coder: Any, out: Path, record: dict[str, Any], checked: int) -> dict[str, Any]:
    """Save an autoencoder with what is left of drawn scenes that pass through it."""
    record["quality"] = {"scenes passed through": passed(coder, checked)}
    told = f"# {record['name']}\n\n{_table(record['quality'])}\n"
    finish(out, coder.save_pretrained, record, told)
    return record


@torch.no_grad()
def passed(coder: Any, count: int, seed: int = 20_000) -> dict[str, float]:
    """What the judge says of scenes after autoencoding: the ceiling of any image made with it."""
    make = torch.Generator(coder.device).manual_seed(seed)
    few = sample(count, device=coder.device, generator=make, held_out=None)
    told = [coder.encode(2 * x - 1).latent_dist.mean for x in few.images(SIDE).split(50)]
    again = torch.cat([coder.decode(t).sample for t in told])
    return judged((again / 2 + 0.5).clamp(0, 1), few)


def train_sd(
    out: Path,
    *,
    minutes: float = 6.0,
    device: str = "cpu",
    seed: int = 0,
    vae: Path | None = None,
    start: Path | None = None,
    batch: int = 512,
    rate: float = 1e-3,
    steps: int | None = None,
    checked: int = 200,
) -> dict[str, Any]:
    """Train `shapes-sd`: v-prediction on SD's noise schedule, the text encoder with the UNet.

    On the autoencoder `vae`, or on from `start`, the folder of such a pipeline.
    """
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    pipe, before = _begun("shapes-sd", sd_pipeline, vae, start, device)
    coder = pipe.vae
    unet, encoder = pipe.unet.to(device), pipe.text_encoder.to(device)
    unet.to(memory_format=torch.channels_last)
    noise = pipe.scheduler.alphas_cumprod.to(device)
    ids_of = _ids(pipe.tokenizer, device)

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, textures=0.15)
        ids = ids_of(captions.write(drawn, captions.PLAIN, make), drop=0.1, generator=make)
        clean = _latents(coder, drawn)
        eps = torch.randn(clean.shape, device=device, generator=make)
        t = torch.randint(TRAINED_STEPS, (batch,), device=device, generator=make)
        a = noise[t].sqrt()[:, None, None, None]
        s = (1 - noise[t]).sqrt()[:, None, None, None]
        with half(device):
            text = encoder(ids).last_hidden_state
            noised = (a * clean + s * eps).contiguous(memory_format=torch.channels_last)
            found = unet(noised, t, text).sample.float()
        return F.mse_loss(found, a * eps - s * clean)

    record = train("shapes-sd", loss_of, [{"params": list(_parameters(unet, encoder))}],
                   samples=batch, minutes=minutes, rate=rate, steps=steps, device=device,
                   decay=0.9995, save=partial(save_folder, out, pipe.save_pretrained))  # fmt: skip
    record |= {"seed": seed, "batch": batch, "rate": rate, **before}
    return _finish(pipe, out, record, device, checked)


def train_dit(
    out: Path,
    *,
    minutes: float = 6.0,
    device: str = "cpu",
    seed: int = 0,
    vae: Path | None = None,
    start: Path | None = None,
    batch: int = 384,
    rate: float = 1e-3,
    steps: int | None = None,
    checked: int = 200,
) -> dict[str, Any]:
    """Train `shapes-dit`: rectified flow, captions with filler words and parts of scenes.

    On the autoencoder `vae`, or on from `start`, the folder of such a pipeline.
    """
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    pipe, before = _begun("shapes-dit", dit_pipeline, vae, start, device)
    coder = pipe.vae
    model = pipe.transformer.to(device)
    encoders = [pipe.text_encoder.to(device), pipe.text_encoder_2.to(device)]
    ids_of = _ids(pipe.tokenizer, device)
    width = model.config.joint_attention_dim

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 2, 3), textures=0.15)
        ids = ids_of(captions.write(drawn, captions.SPOKEN, make), drop=0.1, generator=make)
        clean = _latents(coder, drawn)
        eps = torch.randn(clean.shape, device=device, generator=make)
        s = torch.randn(batch, device=device, generator=make).sigmoid()
        wide = s[:, None, None, None]
        blanks = BLANKS[step % len(BLANKS)]
        with half(device):
            told = [e(ids, output_hidden_states=True) for e in encoders]
            text = torch.cat([t.hidden_states[-2] for t in told], -1)
            text = torch.cat([text, text.new_zeros(batch, blanks, width)], 1)
            pooled = torch.cat([t.text_embeds for t in told], -1)
            found = model(
                hidden_states=(1 - wide) * clean + wide * eps,
                timestep=1000 * s,
                encoder_hidden_states=text,
                pooled_projections=pooled,
            ).sample.float()
        return F.mse_loss(found, eps - clean)

    record = train("shapes-dit", loss_of, [{"params": list(_parameters(model, *encoders))}],
                   samples=batch, minutes=minutes, rate=rate, steps=steps, device=device,
                   decay=0.9995, save=partial(save_folder, out, pipe.save_pretrained))  # fmt: skip
    record |= {"seed": seed, "batch": batch, "rate": rate, **before}
    return _finish(pipe, out, record, device, checked)


def _parameters(*modules: nn.Module) -> Iterator[nn.Parameter]:
    return chain.from_iterable(m.parameters() for m in modules)


@torch.no_grad()
def _latents(coder: Any, drawn: Drawn) -> Tensor:
    """Drawn scenes as both pipelines see them, `[scenes, channels, height, width]`."""
    with half(coder.device.type):
        means = coder.encode(2 * drawn.images(SIDE) - 1).latent_dist.mean.float()
    latents: Tensor = means * coder.config.scaling_factor
    return latents


def sd_pipeline(coder: Any) -> Any:
    """`shapes-sd` before training."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(captions.WORDS, LENGTH)
    width = 128
    text = CLIPTextConfig(**_clip(tokenizer, width, 2))
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,  # the number of heads, in this class
        cross_attention_dim=width,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=coder,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit_pipeline(coder: Any) -> Any:
    """`shapes-dit` before training."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(captions.WORDS, LENGTH)
    texts = [CLIPTextModelWithProjection(CLIPTextConfig(**_clip(tokenizer, 64, 3)))
             for _ in range(2)]  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        caption_projection_dim=160,
        pooled_projection_dim=128,
        out_channels=CHANNELS,
        pos_embed_max_size=2 * LATENT,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=coder,
        text_encoder=texts[0],
        tokenizer=tokenizer,
        text_encoder_2=texts[1],
        tokenizer_2=clip_tokenizer(captions.WORDS, LENGTH),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _clip(tokenizer: Any, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _ids(tokenizer: Any, device: str) -> Any:
    """A function: rows of word numbers -> token ids as the tokenizer makes them, padded."""
    table = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in captions.WORDS])
    if None in table or tokenizer.unk_token_id in table:
        raise InputError("the tokenizer splits a word of the scenes: every word must be one token")
    end = tokenizer.eos_token_id
    to_id = torch.tensor([end, *table], device=device)

    def ids(words: Tensor, drop: float = 0.0, generator: Any = None) -> Tensor:
        rows = to_id[words][:, : LENGTH - 2]
        rows = F.pad(rows, (0, LENGTH - 1 - rows.shape[1]), value=end)
        if drop:
            blank = torch.rand(len(rows), 1, device=rows.device, generator=generator) < drop
            rows = torch.where(blank, end, rows)
        return F.pad(rows, (1, 0), value=tokenizer.bos_token_id)

    return ids


def _begun(
    name: str,
    assemble: Callable[[Any], Any],
    vae: Path | None,
    start: Path | None,
    device: str,
) -> tuple[Any, dict[str, Any]]:
    """The pipeline to train, with its autoencoder frozen on the device; and, where it was trained
    before, what its record says of that.
    """
    if start is None:
        return assemble(_coder(vae, device)), {}
    if vae is not None:
        raise InputError("the pipeline of --start has an autoencoder: leave --vae out")
    before = {"before": earlier(Path(start), name)}
    pipe = load_pipeline(start)
    pipe.vae.to(device).eval().requires_grad_(False)
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not pipe.vae:
            part.train()
    return pipe, before


def _coder(vae: Path | None, device: str) -> Any:
    from diffusers import AutoencoderKL

    if vae is None or not (Path(vae) / "config.json").is_file():
        raise InputError(
            "name the folder of the autoencoder, --vae DIR: make it with `regard zoo train "
            "shapes-vae --out DIR`"
        )
    return AutoencoderKL.from_pretrained(vae).to(device).eval().requires_grad_(False)


def _finish(
    pipe: Any, out: Path, record: dict[str, Any], device: str, checked: int
) -> dict[str, Any]:
    """Judge images of captions on training's and on held-out pairs, and save the record."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    record["sampling"] = {"steps": STEPS, "guidance": GUIDANCE}
    record["quality"] = quality(pipe, checked) if checked else {}
    finish(out, pipe.save_pretrained, record, card(record))
    return record


def quality(pipe: Any, count: int, seed: int = 10_000) -> dict[str, dict[str, float]]:
    """Shares of images that are right, on pairs seen in training and on held-out ones."""
    found = {}
    for name, held_out in (("pairs of training", False), ("held-out pairs", True)):
        make = torch.Generator().manual_seed(seed)
        drawn = sample(count, generator=make, held_out=held_out)
        images = []
        for start in range(0, count, 100):
            prompts = [drawn.scene(n).caption() for n in range(start, min(count, start + 100))]
            noise = [torch.Generator().manual_seed(seed + start + n) for n in range(len(prompts))]
            made = pipe(
                prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise,
                output_type="np",
            ).images  # fmt: skip
            images.append(torch.from_numpy(made).permute(0, 3, 1, 2))
        found[name] = judged(torch.cat(images), drawn)
    return found


def judged(images: Tensor, drawn: Drawn) -> dict[str, float]:
    """Shares of images `[scenes, 3, side, side]` that show what their scene says."""
    from regard.trials.scenes import judge

    pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
    verdicts = [judge(pixels[n], drawn.scene(n)) for n in range(len(drawn))]
    names = ("present", "colors", "shapes", "binding", "place", "background")
    return {n: sum(getattr(v, n) for v in verdicts) / len(verdicts) for n in names} | {
        "scenes": len(verdicts)
    }


def card(record: dict[str, Any]) -> str:
    """The model's card, from what was recorded."""
    s = record
    return "\n".join(
        [
            f"# {s['name']}",
            "",
            "A small text-to-image pipeline of the real diffusers classes, trained on drawn scenes "
            f"(64 x 64 pixels) by `regard zoo train {s['name']}`. For showing and testing methods; "
            "it knows shapes, colours and places, and nothing else.",
            "",
            f"Training: {'; then '.join(_trainings(s))}.",
            "",
            f"Images of {STEPS} steps, guidance {GUIDANCE:g}, judged by colour and outline; shares "
            "that are right:",
            "",
            _table(s["quality"]),
            "",
            *_of_decoder(s),
            "The loss curve is in `training.json`. Licence: Apache-2.0, as regard.",
            "",
        ]
    )


def _trainings(record: dict[str, Any]) -> list[str]:
    """What each training saw, the first one first."""
    s = record
    return [
        *(_trainings(s["before"]) if "before" in s else []),
        f"{s['samples']:,} scenes in {s['steps']:,} steps of {s['batch']}, {s['seconds']:.0f} s on "
        f"{s['device']}, rate {s['rate']}, seed {s['seed']}",
    ]


def _of_decoder(record: dict[str, Any]) -> list[str]:
    s = record.get("decoder")
    if s is None:
        return []
    return [
        f"The decoder of images was then trained on by itself (`regard zoo train shapes-decoder`): "
        f"{s['samples']:,} scenes in {s['seconds']:.0f} s. What a drawn scene keeps when it passes "
        "through the autoencoder, the ceiling of these images:",
        "",
        _table(s["quality"]),
        "",
    ]


def _table(quality: dict[str, dict[str, float]]) -> str:
    if not quality:
        return "Not judged."
    names = list(next(iter(quality.values())))
    rows = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for label, values in quality.items():
        cells = [f"{values[n]:.2f}" if n != "scenes" else f"{values[n]:.0f}" for n in names]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


__all__: Sequence[str] = ["autoencoder", "dit_pipeline", "sd_pipeline", "train_dit", "train_sd"]
