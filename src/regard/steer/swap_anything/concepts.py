"""A concept from a few pictures: the embedding of one word, learnt by textual inversion.

The word stands for the concept in prompts; only its input embedding is learnt, and the pipeline is
never changed. What is learnt is one tensor of a safetensors file, in the form that diffusers'
`load_textual_inversion` reads. While it is learnt, a hidden file beside it holds what it takes to
go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from regard import files
from regard.errors import InputError
from regard.parts.diffusion import kept
from regard.parts.diffusion.encodings import encode_with
from regard.parts.diffusion.inversion import encode_image, fingerprint, frozen, predict
from regard.parts.diffusion.prompt_to_prompt import token_ids

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


def encode(pipe: Any, prompt: str, word: str, vector: Tensor) -> Tensor:
    """The encoding of a prompt in which a word stands for a learnt concept, `[1, tokens, dim]`."""
    token = word_id(pipe, word)
    at = [n for n, one in enumerate(token_ids(pipe.tokenizer, prompt)) if one == token]
    if not at:
        raise InputError(f"{word!r} is not in {prompt!r}: the word stands for the concept there")
    return encode_with(pipe, prompt, at, vector.expand(len(at), -1))


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
    file: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """The embedding under which the pipeline draws what these pictures show, `[dim]`.

    Args:
        word: a word of one token to begin with, which stands for the concept in `prompt`.
        prompt: what the pictures are called; {} is the word.
        file: keep the concept here, step by step, and go on from what is there; what was learnt
            from other pictures or with other settings is not taken up.
        progress: called after each step that is made.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> learn(pipe, [Image.new("RGB", (32, 32), "red")], "circle", steps=1).shape
    torch.Size([32])

    Raises:
        InputError: no picture, pictures of several sizes, or a word of several tokens.
    """
    if not images:
        raise InputError("a concept needs at least one picture")
    if len({image.size for image in images}) > 1:
        raise InputError("the pictures of a concept have one size: resize them first")
    token, device = word_id(pipe, word), pipe.unet.device
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = torch.cat([encode_image(pipe, image) for image in images])
    plan = dumps([word, prompt, steps, lr, batch, seed, fingerprint(pipe, latents)])
    part = None if file is None else file.with_name(f".{file.name}.unfinished")
    finished = kept.read(file, plan)
    if finished is not None:
        return finished[TOKEN].flatten().to(device)
    start = pipe.text_encoder.get_input_embeddings().weight[token]
    vector = start.detach().clone().float().requires_grad_()
    adam = torch.optim.AdamW([vector], lr=lr, weight_decay=0.0)
    first = _resume(kept.read(part, plan), vector, adam, make)
    noise_of = pipe.scheduler
    last = noise_of.config.num_train_timesteps
    with frozen(pipe.unet, pipe.text_encoder), torch.enable_grad():
        for _ in range(first, steps):
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
            state = {**adam.state[vector], "vector": vector, "noise": make.get_state()}
            kept.write(part, state, plan)
            if progress is not None:
                progress()
    if file is not None and part is not None:
        save(file, vector.detach(), {"plan": plan})
        part.unlink(missing_ok=True)
    return vector.detach()


def _resume(
    state: dict[str, Tensor] | None,
    vector: Tensor,
    adam: torch.optim.Optimizer,
    make: torch.Generator,
) -> int:
    """Put all three where the last run stopped; how many steps it had made."""
    if state is None:
        return 0
    with torch.no_grad():
        vector.copy_(state["vector"])
    names = ("step", "exp_avg", "exp_avg_sq")
    adam.state[vector] = {n: state[n].to("cpu" if n == "step" else vector) for n in names}
    make.set_state(state["noise"])
    return int(state["step"])


def save(path: Path, vector: Tensor, about: dict[str, str] | None = None) -> None:
    """Write a concept whole or not at all."""
    files.write_bytes(path, to_bytes({TOKEN: vector[None].contiguous().cpu()}, about))


def load(path: Path) -> Tensor:
    """The vector of a concept's file.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    try:
        with safe_open(path, "pt") as held:
            names = list(held.keys())
            if len(names) == 1:
                vector: Tensor = held.get_tensor(names[0]).flatten()
                return vector
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except SafetensorError as problem:
        raise InputError(f"{path} is no learnt concept: {problem}") from None
    raise InputError(f"{path} is no learnt concept: it holds {len(names)} tensors, not one")
