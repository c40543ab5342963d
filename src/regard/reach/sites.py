"""Which attention modules a transformers model has, how they are numbered, and what a person may
pass in place of the model itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from regard.errors import ReachError

from .call import Site

_CROSS = re.compile(r"cross|enc_?dec|encoder_?attn", re.IGNORECASE)
_WRAPPED = ("_orig_mod", "module", "base_model", "model")


def unwrapped(model: Any) -> Any:
    """The transformers model that a person means: a compiled model, a model with PEFT adapters,
    one in parallel or a pipeline hold it.

    The class of a wrapper says so by handing its forward pass on to what it holds.
    """
    seen: set[int] = set()
    while not isinstance(model, PreTrainedModel) and id(model) not in seen:
        seen.add(id(model))
        held = (getattr(model, name, None) for name in _WRAPPED)
        model = next((m for m in held if m is not None and hasattr(m, "forward")), model)
    return model


def sites(model: Any) -> list[Site]:
    """Every attention module of the model that asks the `AttentionInterface`, in order of
    definition.

    Raises:
        ReachError: the model is not a transformers model, or none of its modules asks the
            interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise ReachError(
            f"{type(model).__name__} is not a transformers model: pass the PreTrainedModel itself"
        )
    found: list[Site] = []
    for module, names in _attending(model):
        # ALBERT runs several layers through one module
        groups = getattr(model.config, "num_hidden_groups", None)
        turns = model.config.num_hidden_layers // groups if groups else 1
        for name in names:
            for turn in range(turns):
                site = site_like(len(found), name, module)
                found.append(replace(site, layer=site.layer * turns + turn))
    if not found:
        raise ReachError(
            f"{type(model).__name__} computes attention by itself or has none, and never asks "
            "transformers' AttentionInterface, so regard cannot reach it: use a model class of "
            "transformers 5 that does"
        )
    return found


def _attending(model: Any) -> Iterator[tuple[Any, list[str]]]:
    """The attention modules and the names of each: several where layers share a module."""
    for name, module in model.named_modules():
        if _asks_interface(module):
            yield module, [name]


def _asks_interface(module: Any) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def site_like(index: int, name: str, module: Any) -> Site:
    """The site of a module by its name, and by what it says of itself."""
    numbers = re.search(r"^(.*?)\.?(\d+)(\.|$)", name)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        layer = int(numbers.group(2)) if numbers else index
    cross = bool(getattr(module, "is_cross_attention", False)) or bool(
        _CROSS.search(name.rsplit(".", 2)[-1])
    )
    if not cross and "." in name:
        cross = bool(_CROSS.search(name.split(".")[-1])) or bool(
            re.search(r"crossattention|EncDecAttention", name)
        )
    part = numbers.group(1) if numbers else name
    return Site(
        index, name, layer, part + (" cross" if cross else ""), "cross" if cross else "self"
    )
