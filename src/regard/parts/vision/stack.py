"""The language model's stack inside a vision-language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regard.errors import InputError, ReachError
from regard.reach import Site


def decoder(model: Any, method: str) -> Any:
    """The language model's stack, the module with `.layers`, of a model that reads images as
    tokens.

    Raises:
        InputError: a model without image tokens.
        ReachError: a model whose images are in an attention of their own, or without decoder
            layers.
    """
    config = getattr(model, "config", None)
    if not image_ids(config) or not hasattr(model, "get_decoder"):
        raise InputError(
            f"{type(model).__name__} reads no images as tokens, and {method} works on image "
            "tokens: name a vision-language model such as LLaVA or Qwen-VL"
        )
    body = model.get_decoder()
    layers = getattr(body, "layers", None)
    if layers is None:
        raise ReachError(
            f"the language model of {type(model).__name__} has no list of layers that {method} "
            "can reach"
        )
    if any("cross" in name for name, _ in body.named_modules()):
        raise ReachError(
            f"{type(model).__name__} looks at images through cross-attention, and {method} works "
            "on image tokens in the sequence: name a model of LLaVA's or Qwen-VL's layout"
        )
    return body


def image_ids(config: Any) -> dict[str, int]:
    """The token ids that stand for patches, by what they show."""
    image = getattr(config, "image_token_id", None)
    image = getattr(config, "image_token_index", None) if image is None else image
    video = getattr(config, "video_token_id", None)
    ids = {"image": image, "video": video}
    if image is None or getattr(config, "vision_config", None) is None:
        return {}
    return {name: int(n) for name, n in ids.items() if n is not None}


def has_class_token(model: Any) -> bool:
    """Whether the vision tower puts a class token before the patches, as that of CLIP does."""
    return any(name.endswith("class_embedding") for name, _ in model.named_parameters())


def layer_sites(model: Any, body: Any, sites: Iterable[Site]) -> dict[int, Site]:
    """The site of attention in each layer of the language model, by the layer's number."""
    names = {id(m): n for n, m in model.named_modules()}
    by_layer: dict[int, Site] = {}
    for n, layer in enumerate(body.layers):
        prefix = names[id(layer)] + "."
        for site in sites:
            if site.name.startswith(prefix):
                by_layer.setdefault(n, site)
    return by_layer
