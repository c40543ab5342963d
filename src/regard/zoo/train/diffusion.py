"""Recipes of `shapes-sd` and `shapes-dit`: small pipelines of the real classes on drawn scenes.

64 x 64 pixels, an autoencoder of factor 4 that both share, words of one token each. `shapes-sd` is
the whole `StableDiffusionPipeline` (causal CLIP text encoder, UNet with cross-attention at 16, 8
and 4, DDIM); `shapes-dit` the `StableDiffusion3Pipeline` without T5 (two CLIPs, joint attention
over 64 image tokens, rectified flow). Pairs of colour and shape that `scenes.is_held_out` names
are never drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import InputError
from regard.zoo.pipelines import load_pipeline
from regard.zoo.tiny_diffusion import clip_text, clip_tokenizer

from . import captions
from .checkpoint import Checkpoint
from .coder import CHANNELS, LATENT, judged, latents_of, load_coder, table
from .drawing import sample
from .loop import Counted, earlier, finish, half, placed, save_folder, train, trainings
from .reading import Reading, keep, pointing

TRAINED_STEPS = 1000
STEPS, GUIDANCE = 25, 4.0  # of the images that are judged
BLANKS = (256, 256, 32, 256, 0)  # empty T5 tokens in shapes-dit; the stock pipeline puts 256
READ = 0.1  # weight of what the states halfway are read for
EARLY, FIRST = 0.25, 0.15  # share of draws from that first share of the way, where places settle
POINT, DEEP = 0.4, 2  # weight of where words are looked at, and the first layer that is asked
TAUGHT = (
    "Its attention was taught to look at the words of a thing from that thing (the loss of "
    "TokenCompose, weight `pointing` in `training.json`): its word maps are like those of large "
    "models, but did not come by themselves."
)
DROP = 0.1  # share of scenes without caption, for guidance


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

    On the autoencoder `vae`, or on from `start`, the folder of such a pipeline; with both, what
    `start` holds is moved onto `vae`.
    """
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    pipe, before = _begun("shapes-sd", sd_pipeline, vae, start, device)
    coder = pipe.vae
    unet, encoder = placed(pipe.unet, device), pipe.text_encoder.to(device)
    states: dict[str, Tensor] = {}
    hook = keep(unet.up_blocks[1], states, "halfway")
    reading = Reading(unet.config.block_out_channels[1]).to(device)
    noise = pipe.scheduler.alphas_cumprod.to(device)
    ids_of = _ids(pipe.tokenizer, device)

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 2), textures=0.15)
        words = captions.write(drawn, captions.PLAIN, make)
        words *= ~_chance(DROP, batch, make)[:, None]
        clean = latents_of(coder, drawn)
        eps = torch.randn(clean.shape, device=device, generator=make)
        t = torch.randint(TRAINED_STEPS, (batch,), device=device, generator=make)
        first = int((1 - FIRST) * TRAINED_STEPS)
        t = torch.where(_chance(EARLY, batch, make), first + t % (TRAINED_STEPS - first), t)
        a = noise[t].sqrt()[:, None, None, None]
        s = (1 - noise[t]).sqrt()[:, None, None, None]
        with half(device):
            text = encoder(ids_of(words)).last_hidden_state
            found = unet(a * clean + s * eps, t, text).sample.float()
            read = reading.loss(states["halfway"], drawn)
        return F.mse_loss(found, a * eps - s * clean) + READ * read

    trained = list(_parameters(unet, encoder, reading))
    record = train("shapes-sd", loss_of, [{"params": trained}],
                   samples=batch, minutes=minutes, rate=rate, steps=steps, device=device,
                   decay=0.9995, save=partial(save_folder, out, pipe.save_pretrained),
                   kept=Checkpoint(out, make, frozen=[coder]))  # fmt: skip
    hook.remove()
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
    """Train `shapes-dit`: rectified flow, captions with filler words and parts of scenes; and words
    that are looked at from their things (`pointing`).

    On the autoencoder `vae`, or on from `start`, the folder of such a pipeline; with both, what
    `start` holds is moved onto `vae`.
    """
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    pipe, before = _begun("shapes-dit", dit_pipeline, vae, start, device)
    coder = pipe.vae
    model = pipe.transformer.to(device)
    encoders = [pipe.text_encoder.to(device), pipe.text_encoder_2.to(device)]
    ids_of = _ids(pipe.tokenizer, device)
    # joint blocks give the states of the text, then those of the image
    states: dict[str, Tensor] = {}
    hook = keep(model.transformer_blocks[model.config.num_layers // 2], states, "halfway", part=1)
    reading = Reading(model.inner_dim).to(device)
    side = LATENT // model.config.patch_size

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 2, 3), textures=0.15)
        words = captions.write(drawn, captions.SPOKEN, make)
        words *= ~_chance(DROP, batch, make)[:, None]
        clean = latents_of(coder, drawn)
        eps = torch.randn(clean.shape, device=device, generator=make)
        s = torch.randn(batch, device=device, generator=make).sigmoid()
        s = torch.where(
            _chance(EARLY, batch, make),
            1 - FIRST * torch.rand(batch, device=device, generator=make),
            s,
        )
        wide = s[:, None, None, None]
        with half(device):
            told = [e(ids_of(words), output_hidden_states=True) for e in encoders]
            text = torch.cat([t.hidden_states[-2] for t in told], -1)
            pooled = torch.cat([t.text_embeds for t in told], -1)
            with Counted(BLANKS[step % len(BLANKS)]) as counted:
                found = model(
                    hidden_states=(1 - wide) * clean + wide * eps,
                    timestep=1000 * s,
                    encoder_hidden_states=F.pad(text, (0, 0, 0, 1)),
                    pooled_projections=pooled,
                ).sample.float()
            image = states["halfway"].transpose(1, 2).unflatten(2, (side, side))
            read = reading.loss(image, drawn)
            pointed = pointing(counted.seen[DEEP:], words, drawn, 1 - s)
        return F.mse_loss(found, eps - clean) + READ * read + POINT * pointed

    trained = list(_parameters(model, *encoders, reading))
    record = train("shapes-dit", loss_of, [{"params": trained}],
                   samples=batch, minutes=minutes, rate=rate, steps=steps, device=device,
                   decay=0.9995, save=partial(save_folder, out, pipe.save_pretrained),
                   kept=Checkpoint(out, make, frozen=[coder]))  # fmt: skip
    hook.remove()
    record |= {"seed": seed, "batch": batch, "rate": rate, "pointing": POINT, **before}
    return _finish(pipe, out, record, device, checked)


def _parameters(*modules: nn.Module) -> Iterator[nn.Parameter]:
    return chain.from_iterable(m.parameters() for m in modules)


def sd_pipeline(coder: Any) -> Any:
    """`shapes-sd` before training."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(captions.WORDS, captions.LENGTH)
    width = 128
    text = clip_text(tokenizer, width=width, inner=4)
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
        text_encoder=text,
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

    tokenizer = clip_tokenizer(captions.WORDS, captions.LENGTH)
    texts = [clip_text(tokenizer, True, width=64, layers=3, inner=4) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        caption_projection_dim=160,
        pooled_projection_dim=128,
        out_channels=CHANNELS,
        pos_embed_max_size=LATENT,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=coder,
        text_encoder=texts[0],
        tokenizer=tokenizer,
        text_encoder_2=texts[1],
        tokenizer_2=clip_tokenizer(captions.WORDS, captions.LENGTH),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _ids(tokenizer: Any, device: str) -> Any:
    """A function: rows of word numbers -> token ids as the tokenizer makes them, padded."""
    table = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in captions.WORDS])
    if None in table or tokenizer.unk_token_id in table:
        raise InputError("the tokenizer splits a word of the scenes: every word must be one token")
    end = tokenizer.eos_token_id
    to_id = torch.tensor([end, *table], device=device)

    def ids(words: Tensor) -> Tensor:
        rows = to_id[words][:, : captions.LENGTH - 2]
        rows = F.pad(rows, (0, captions.LENGTH - 1 - rows.shape[1]), value=end)
        return F.pad(rows, (1, 0), value=tokenizer.bos_token_id)

    return ids


def _chance(share: float, count: int, make: torch.Generator) -> Tensor:
    """Which of so many are of the share."""
    return torch.rand(count, device=make.device, generator=make) < share


def _begun(
    name: str,
    assemble: Callable[[Any], Any],
    vae: Path | None,
    start: Path | None,
    device: str,
) -> tuple[Any, dict[str, Any]]:
    """The pipeline to train, with its autoencoder frozen on the device; and what its record says of
    the autoencoder and, where it was trained before, of that.
    """
    if start is None:
        coder = load_coder(vae, device)
        return assemble(coder), {"autoencoder": _record(vae)}
    before: dict[str, Any] = {"before": earlier(Path(start), name)}
    pipe = load_pipeline(start)
    pipe.vae.to(device).eval().requires_grad_(False)
    told = _record(start).get("autoencoder", {})
    if vae is not None:
        coder, told = load_coder(vae, device), _record(vae)
        move(pipe, coder)
        before["remark"] = "moved onto another autoencoder first"
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not pipe.vae:
            part.train()
    return pipe, {"autoencoder": told, **before}


def _record(folder: Path | None) -> dict[str, Any]:
    """What a folder's record says, but for the curve of its loss."""
    file = Path(folder or "") / "training.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {n: v for n, v in found.items() if n not in ("loss", "versions")}


@torch.no_grad()
def move(pipe: Any, coder: Any, scenes: int = 256) -> None:
    """Put a trained pipeline onto another autoencoder, as a start for its training there.

    Its first layer meets the new latents turned to where the old ones lay, and what its last layer
    gives is turned back: by the rotation that brings both nearest over drawn scenes (orthogonal
    Procrustes), under which noise stays white.
    """
    drawn = sample(scenes, device=coder.device, generator=torch.Generator(coder.device))
    old, new = (latents_of(c, drawn).transpose(0, 1).flatten(1) for c in (pipe.vae, coder))
    left, _, right = torch.linalg.svd(old @ new.T)
    turn = (left @ right).cpu()  # old = turn @ new, as nearly as can be
    if hasattr(pipe, "unet"):
        first, last = pipe.unet.conv_in, pipe.unet.conv_out
    else:
        first, last = pipe.transformer.pos_embed.proj, pipe.transformer.proj_out
    first.weight.copy_(torch.einsum("oihw,ij->ojhw", first.weight, turn))
    # a patch of several latents lies in rows of their channels, one after the other
    rows = last.weight.flatten(1).unflatten(0, (-1, len(turn)))
    last.weight.copy_((turn.T @ rows).reshape(last.weight.shape))
    last.bias.copy_((last.bias.unflatten(0, (-1, len(turn))) @ turn).flatten())
    pipe.register_modules(vae=coder)


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


def card(record: dict[str, Any]) -> str:
    """The model's card, from what was recorded."""
    s = record
    return "\n".join(
        [
            f"# {s['name']}",
            "",
            "A small text-to-image pipeline of the real diffusers classes, trained on drawn scenes "
            f"(64 x 64 pixels) by `regard zoo train {s['name']}`. For showing and testing methods; "
            "it knows drawn shapes and colours, and nothing else.",
            "",
            f"Training: {'; then '.join(trainings(s, _told))}.",
            "",
            f"Images of {STEPS} steps, guidance {GUIDANCE:g}, judged by colour and outline; shares "
            "that are right:",
            "",
            table(s["quality"]),
            "",
            *([TAUGHT, ""] if "pointing" in s else []),
            *_of_autoencoder(s.get("autoencoder")),
            "The loss curve is in `training.json`. Licence: Apache-2.0, as regard.",
            "",
        ]
    )


def _told(s: dict[str, Any]) -> str:
    """What one training saw."""
    return (
        f"{s['samples']:,} scenes in {s['steps']:,} steps of {s['batch']}, {s['seconds']:.0f} s on "
        f"{s['device']}, rate {s['rate']}, seed {s['seed']}"
    )


def _of_autoencoder(record: dict[str, Any] | None) -> list[str]:
    if not record:
        return []
    return [
        f"Autoencoder: {'; then '.join(trainings(record, _told))}. What a drawn scene keeps when "
        "it passes through, the ceiling of these images:",
        "",
        table(record["quality"]),
        "",
    ]
