"""Recipes of the autoencoder that `shapes-sd` and `shapes-dit` are built on, and its judge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import InputError
from regard.report.table import from_grid

from .checkpoint import Checkpoint
from .drawing import Drawn, sample
from .loop import earlier, finish, half, placed, save_folder, train
from .reading import Reading

SIDE, LATENT, CHANNELS = 64, 16, 8
NOISE = 0.5  # at most, of the latents' spread: a decoder that forgives what a denoiser gets wrong
READ = 0.05  # weight of what the latents are read for
ON_THINGS = 3.0  # further weight of pixels on and near things, which are few


def autoencoder() -> Any:
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
        shift_factor=0.0,
    )


def train_vae(
    out: Path,
    *,
    minutes: float = 3.0,
    device: str = "cpu",
    seed: int = 0,
    start: Path | None = None,
    batch: int = 48,
    rate: float = 1e-3,
    steps: int | None = None,
    checked: int = 200,
) -> dict[str, Any]:
    """Train the autoencoder; its scaling factor is measured at the end.

    Its latents are read for shape, colour and place of the things (`reading`), and reach the
    decoder with up to half their spread of noise. `start` is the folder of an autoencoder to go on
    from, such as `vae` in a pipeline's.
    """
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    vae, before = autoencoder(), {}
    if start is not None:
        before = {"before": earlier(Path(start), "shapes-vae")}
        vae = load_coder(start, device).requires_grad_(True).train()
    vae = placed(vae, device)
    reading = Reading(CHANNELS).to(device)

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 2, 3), textures=0.15)
        images = 2 * drawn.images(SIDE) - 1
        with half(device):
            told = vae.encode(images).latent_dist
            z = told.sample(make).float()
            noised = _noised(z, make)
            again = vae.decode(noised).sample.float()
            read = reading.loss(noised, drawn)
        return _apart(again, images) + READ * read + 1e-6 * told.kl().float().mean()

    groups: list[dict[str, Any]] = [{"params": [*vae.parameters()]}]
    groups += [{"params": [*reading.parameters()], "scale": 2.0}]
    record = train("shapes-vae", loss_of, groups, samples=batch, minutes=minutes, rate=rate,
                   steps=steps, device=device, decay=0.998,
                   save=partial(save_folder, out, vae.save_pretrained),
                   kept=Checkpoint(out, make))  # fmt: skip
    vae.eval()
    with torch.no_grad():
        means = _means(vae, sample(512, device=device, generator=make, things=(1, 2, 3)))
        vae.register_to_config(scaling_factor=float(1 / means.std()))
    record |= {"seed": seed, "batch": batch, "rate": rate, **before}
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
    coder = placed(load_coder(vae, device), device)
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    parts = (coder.decoder, coder.post_quant_conv)
    trained = [p.requires_grad_() for part in parts for p in part.parameters()]

    def loss_of(step: int) -> Tensor:
        drawn = sample(batch, device=device, generator=make, things=(1, 2, 3), textures=0.15)
        images = 2 * drawn.images(SIDE) - 1
        with half(device):
            with torch.no_grad():
                noised = _noised(coder.encode(images).latent_dist.mean, make)
            again = coder.decode(noised).sample.float()
        return _apart(again, images)

    record = train("shapes-decoder", loss_of, [{"params": trained}], samples=batch,
                   minutes=minutes, rate=rate, steps=steps, device=device, decay=0.998,
                   kept=Checkpoint(out, make, frozen=[coder.encoder]))  # fmt: skip
    record |= {"seed": seed, "batch": batch, "rate": rate}
    return _passing(coder, out, record, checked)


def _noised(latents: Tensor, make: torch.Generator) -> Tensor:
    """Latents with noise, each scene's with its own share of their spread."""
    made: dict[str, Any] = {"device": latents.device, "generator": make}
    share = NOISE * torch.rand(len(latents), 1, 1, 1, **made)
    return latents + share * latents.detach().std() * torch.randn(latents.shape, **made)


def _apart(again: Tensor, images: Tensor) -> Tensor:
    """How far images are from those they were made of; a corner always shows the ground."""
    things = (images != images[:, :, :1, :1]).any(1, keepdim=True).float()
    weight = 1 + ON_THINGS * F.max_pool2d(things, 5, 1, 2)
    error = again - images
    return (weight / weight.mean() * (error.abs() + 0.5 * error.square())).mean()


def load_coder(folder: Path | None, device: str) -> Any:
    """A trained autoencoder, frozen.

    Raises:
        InputError: no folder of one.
    """
    from diffusers import AutoencoderKL

    if folder is None or not (Path(folder) / "config.json").is_file():
        raise InputError(
            "name the folder of the autoencoder, --vae DIR: make it with `regard zoo train "
            "shapes-vae --out DIR`"
        )
    coder: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    return coder.to(device).eval().requires_grad_(False)


@torch.no_grad()
def latents_of(coder: Any, drawn: Drawn) -> Tensor:
    """Drawn scenes as both pipelines see them, `[scenes, channels, height, width]`."""
    with half(coder.device.type):
        latents: Tensor = _means(coder, drawn).float() * coder.config.scaling_factor
    return latents


def _means(coder: Any, drawn: Drawn) -> Tensor:
    """Drawn scenes as the encoder sees them, not yet scaled."""
    few = drawn.images(SIDE).split(512)
    return torch.cat([coder.encode(2 * x - 1).latent_dist.mean for x in few])


def _passing(coder: Any, out: Path, record: dict[str, Any], checked: int) -> dict[str, Any]:
    """Save an autoencoder with what is left of drawn scenes that pass through it."""
    record["quality"] = {"scenes passed through": passed(coder, checked)}
    told = f"# {record['name']}\n\n{table(record['quality'])}\n"
    finish(out, coder.save_pretrained, record, told)
    return record


@torch.no_grad()
def passed(coder: Any, count: int, seed: int = 20_000) -> dict[str, float]:
    """What the judge says of scenes after autoencoding: the ceiling of any image made with it."""
    make = torch.Generator(coder.device).manual_seed(seed)
    few = sample(count, device=coder.device, generator=make, held_out=None)
    again = torch.cat([coder.decode(t).sample for t in _means(coder, few).split(50)])
    return judged((again / 2 + 0.5).clamp(0, 1), few)


def judged(images: Tensor, drawn: Drawn) -> dict[str, float]:
    """Shares of images `[scenes, 3, side, side]` that show what their scene says."""
    from regard.lab.trials.scenes import judge

    pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
    verdicts = [judge(pixels[n], drawn.scene(n)) for n in range(len(drawn))]
    names = ("present", "colors", "shapes", "binding", "place", "background")
    return {n: sum(getattr(v, n) for v in verdicts) / len(verdicts) for n in names} | {
        "scenes": len(verdicts)
    }


def table(quality: dict[str, dict[str, float]]) -> str:
    """A table of shares for a card."""
    if not quality:
        return "Not judged."
    names = list(next(iter(quality.values())))
    rows = [
        [label, *(f"{values[n]:.{0 if n == 'scenes' else 2}f}" for n in names)]
        for label, values in quality.items()
    ]
    return from_grid([["", *names], *rows]).markdown()
