"""The dims of massive activation, by which sink tokens are known: of known models, and of any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.parts.vision import decoder

EPS = 1e-6
STEADY = 0.8  # share of layers and prompts in which a massive dim stands out
DIMS: dict[str, tuple[int, ...]] = {
    "llava-1.5-7b": (1415, 2533),
    "llama-2-13b": (2100, 4743),
    "qwen2-vl-7b": (458, 2570),
    "internvl2-8b": (3584,),
    "smollm2-135m": (507, 247),
}
"""Dimensions of massive activation, as the paper gives them; SmolLM2's by `find_sink_dims`."""
# (layers, hidden size, key heads, family) of the language models whose dims are known
_KNOWN = {
    (32, 4096, 32, "llama"): "llava-1.5-7b",
    (40, 5120, 40, "llama"): "llama-2-13b",
    (28, 3584, 4, "qwen2_vl_text"): "qwen2-vl-7b",
    (30, 576, 3, "llama"): "smollm2-135m",
}


def relative(x: Tensor, dims: Sequence[int]) -> Tensor:
    """phi, the greatest |x[d]| / rms(x) over the dims, `[batch, tokens]`, at most sqrt(size).

    >>> relative(torch.tensor([[[0.0, 3.0, 4.0, 0.0]]]), [1])
    tensor([[1.2000]])
    """
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rms = (x.square().mean(-1) + EPS).sqrt()
    return x[..., list(dims)].abs().amax(-1) / rms


def find_sink_dims(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    z: float = 5.0,
    most: int = 3,
    layers: Sequence[int] | None = None,
) -> list[int]:
    """The dims of massive activation of a model: those in which the first token stands out.

    The hidden state x of the first token of every prompt, in the middle half of the layers (or
    `layers`), gives |x| / rms(x). Returned are the dims whose mean exceeds `z`, at most `most`,
    greatest first. Each must stand out in four of five layers and prompts (SmolLM2's massive dim is
    gone for two layers in the middle).

    Args:
        prompts: inputs of the model, with or without images.

    Raises:
        InputError: no prompt, no dim stands out, or the layers or prompts disagree.
    """
    body = decoder(model, "find_sink_dims")
    count = len(body.layers)
    wanted = list(range(count // 4, max(count // 4 + 1, 3 * count // 4)))
    wanted = wanted if layers is None else list(layers)
    if not prompts:
        raise InputError("find_sink_dims needs at least one prompt")
    seen: list[Tensor] = []
    first: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["hidden_states"]).detach().float()
        for b, at in enumerate(first[-1].tolist()):
            seen.append(x[b, at].abs() / (x[b, at].square().mean() + EPS).sqrt())

    hooks = [body.layers[n].register_forward_pre_hook(look, with_kwargs=True) for n in wanted]
    try:
        with torch.no_grad():
            for prompt in prompts:
                ids = prompt["input_ids"]
                mask = prompt.get("attention_mask", torch.ones_like(ids))
                first.append(mask.int().argmax(-1))
                model(**prompt, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    each = torch.stack(seen)
    mean = each.mean(0)
    top = [d for d in mean.argsort(descending=True).tolist()[:most] if mean[d] > z]
    if not top:
        raise InputError(
            f"no dim of the first token exceeds {z:g} times the rms (greatest {mean.max():.1f}): "
            "this model shows no massive activation, so VAR finds no sinks in it"
        )
    unsure = [d for d in top if float((each[:, d] > z).float().mean()) < STEADY]
    if unsure:
        raise InputError(
            f"dim {unsure[0]} stands out in some layers or prompts only: name fewer layers, or "
            "give dims by hand"
        )
    return top


def dims_of_model(given: Sequence[int] | str | None, config: Any) -> tuple[int, ...]:
    """The dims that were given, or those known of this language model."""
    if given == "auto":
        raise InputError('dims="auto" needs a prompt: call prepare(model, inputs) first')
    if isinstance(given, str):
        return DIMS[given]
    if given is not None:
        if not given:
            raise InputError("dims is empty: name at least one dim, or leave it out")
        return tuple(int(d) for d in given)
    shape = (config.num_hidden_layers, config.hidden_size)
    known = _KNOWN.get((*shape, config.num_key_value_heads, config.model_type))
    if known is None:
        raise InputError(
            "the massive dims of this language model are not known: find them with "
            "regard.find_sink_dims(model, prompts) and pass dims=, or use --dims auto"
        )
    return DIMS[known]
