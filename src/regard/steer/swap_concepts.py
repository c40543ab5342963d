"""A concept from a few pictures: the embedding of one word, learnt by textual inversion.

The word stands for the concept in prompts; only its input embedding is learnt, and the pipeline is
never changed. What is learnt is one tensor of a safetensors file, in the form that diffusers'
`load_textual_inversion` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import InputError
from regard.reach.inversion import encode_image, frozen, predict

TOKEN = "<concept>"


def word_id(pipe: Any, word: str) -> int:
    """The id of a word that is one token.

    Raises:
        InputError: a word of several tokens.
    """
    ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InputError(
            f"{word!r} is {len(ids)} tokens for this text encoder: choose a word of one token"
        )
    return int(ids[0])


@contextmanager
def _as(pipe: Any, token: int, vector: Tensor) -> Iterator[None]:
    """The text encoder with another input embedding for one token."""

    def swap(module: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        ids = args[0]
        return torch.where((ids == token)[..., None], vector.to(out), out)

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(swap)
    try:
        yield
    finally:
        hook.remove()


def encode(pipe: Any, prompt: str, word: str, vector: Tensor) -> Tensor:
    """The encoding of a prompt in which a word stands for a learnt concept, `[1, tokens, dim]`."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(
        prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipe.unet.device)  # fmt: skip
    token = word_id(pipe, word)
    if not bool((ids == token).any()):
        raise InputError(f"{word!r} is not in {prompt!r}: the word stands for the concept there")
    with _as(pipe, token, vector):
        found = pipe.text_encoder(ids)[0]
    assert isinstance(found, Tensor)
    return found


def learn(
    pipe: Any,
    images: Sequence[Any],
    word: str,
    *,
    prompt: str = "a {}",
    steps: int = 200,
    lr: float = 5e-3,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """The embedding under which the pipeline draws what these pictures show, `[dim]`.

    Args:
        word: a word of one token to begin with, which stands for the concept in `prompt`.
        prompt: what the pictures are called; {} is the word.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> learn(pipe, [Image.new("RGB", (32, 32), "red")], "circle", steps=1).shape
    torch.Size([32])

    Raises:
        InputError: no picture, or a word of several tokens.
    """
    if not images:
        raise InputError("a concept needs at least one picture")
    token, device = word_id(pipe, word), pipe.unet.device
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = torch.cat([encode_image(pipe, image) for image in images])
    start = pipe.text_encoder.get_input_embeddings().weight[token]
    vector = start.detach().clone().float().requires_grad_()
    adam = torch.optim.AdamW([vector], lr=lr, weight_decay=0.0)
    noise_of = pipe.scheduler
    last = noise_of.config.num_train_timesteps
    with frozen(pipe.unet, pipe.text_encoder), torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(latents), (batch,), generator=make)
            clean = latents[rows.to(device)]
            noise = torch.randn(clean.shape, generator=make).to(clean)
            time = torch.randint(last, (batch,), generator=make).to(device)
            embeds = encode(pipe, prompt.format(word), word, vector).expand(batch, -1, -1)
            said = predict(pipe, noise_of.add_noise(clean, noise, time), time, embeds)
            wanted = noise
            if noise_of.config.prediction_type == "v_prediction":
                wanted = noise_of.get_velocity(clean, noise, time)
            loss = F.mse_loss(said.float(), wanted.float())
            (vector.grad,) = torch.autograd.grad(loss, vector)
            adam.step()
            if progress is not None:
                progress()
    return vector.detach()


def save(path: Path, vector: Tensor, token: str = TOKEN) -> None:
    """Write a concept whole or not at all."""
    from safetensors.torch import save

    from regard.files import write_bytes

    write_bytes(path, save({token: vector[None].contiguous().cpu()}))


def load(path: Path) -> Tensor:
    """The vector of a file that `save` wrote."""
    from safetensors.torch import load_file

    held = load_file(path)
    if len(held) != 1:
        raise InputError(f"{path} is no learnt concept: it holds {len(held)} tensors, not one")
    return next(iter(held.values())).flatten()
