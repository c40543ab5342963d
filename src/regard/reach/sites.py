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
from .softmax import attends

_CROSS = re.compile(
    r"cross_?att|crossatt|enc_?dec|encoder_?attn|encoder_decoder_att|\bx_attn", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
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
    """Every attention module of the model that regard reaches, in order of definition, the stack
    that writes text last.

    Raises:
        ReachError: the model is not a transformers model, or none of its modules is reached.
    """
    if not isinstance(model, PreTrainedModel):
        raise ReachError(
            f"{type(model).__name__} is not a transformers model: pass the PreTrainedModel itself"
        )
    attending = list(_attending(model))
    asking = {site_like(0, name, m).part for name, m, _ in attending if asks(m)}
    # kinds of module beside the attention of the same layer, which look at something else
    beside = {type(m) for n, m, _ in attending if not asks(m) and site_like(0, n, m).part in asking}
    attention_sites: list[Site] = []
    first: list[str] = []
    for name, module, turns in attending:
        site = site_like(0, name, module)
        if type(module) in beside:
            site = replace(site, part=f"{site.part} {name.rpartition('.')[2]}", kind="cross")
            first.append(name)
        attention_sites += [replace(site, layer=site.layer * turns + turn) for turn in range(turns)]
    if not attention_sites:
        raise ReachError(
            f"{type(model).__name__} computes attention by itself or has none, and never asks "
            "transformers' AttentionInterface, so regard cannot reach it: use a model class of "
            "transformers 5 that does"
        )
    writes = _decoder(model)
    attention_sites.sort(key=lambda site: site.name not in first)
    attention_sites.sort(
        key=lambda site: writes is not None and f"{site.name}.".startswith(f"{writes}.")
    )
    return [replace(site, index=n) for n, site in enumerate(_numbered(attention_sites))]


def _attending(model: Any) -> Iterator[tuple[str, Any, int]]:
    """The attention modules by name, and how many layers run through each in turn."""
    # ALBERT runs several layers through one module; others name a shared module in every layer
    groups = getattr(model.config, "num_hidden_groups", None)
    turns = setting(model.config, "num_hidden_layers", 1) // groups if groups else 1
    layers: set[tuple[int, tuple[str, ...]]] = set()
    modules: list[tuple[str, Any, int]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        layer = (id(module), tuple(_NUMBER.findall(f".{name}.")))
        if layer not in layers and (asks(module) or attends(module)):
            layers.add(layer)
            modules.append((name, module, turns))
    names = [name for name, *_ in modules]
    for name, module, turns in modules:  # a layer around an attention module is none
        if asks(module) or not any(n.startswith(f"{name}.") for n in names):
            yield name, module, turns


def asks(module: Any) -> bool:
    """Whether a module asks the `AttentionInterface`."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return False
    # Kosmos-2.5 asks it for an attribute, which it never has
    return "get_interface" in code.co_names or "getattr" not in code.co_names


def _decoder(model: Any) -> str | None:
    """The name of the stack that writes text, beside others that read images, sound or text."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, m in model.named_modules() if m is decoder and name), None)


def _numbered(all_sites: list[Site]) -> list[Site]:
    """Sites whose layer numbers tell them apart within their part: by the module's own number, else
    by that in its name, else counted in the order in which they run.
    """
    numbered = all_sites
    for part in dict.fromkeys(s.part for s in all_sites):
        part_sites = [s for s in all_sites if s.part == part]
        named = [s if (n := _number(s.name)) is None else replace(s, layer=n) for s in part_sites]
        counted = [replace(s, layer=n) for n, s in enumerate(part_sites)]
        best = next(x for x in (part_sites, named, counted) if _distinct(x) or x is counted)
        new = {id(old): site for old, site in zip(part_sites, best)}
        numbered = [new.get(id(s), s) for s in numbered]
    return numbered


def _distinct(sites: list[Site]) -> bool:
    layers = [s.layer for s in sites]
    return len(set(layers)) == len(layers) and min(layers) >= 0


def _number(name: str) -> int | None:
    match = _NUMBER.search(f".{name}.")
    return int(match.group(1)) if match else None


def site_like(index: int, name: str, module: Any) -> Site:
    """The site of a module by its name, and by what it says of itself."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        layer = _number(name) or 0
    match = _NUMBER.search(f".{name}.")
    inner = re.split(r"(?:^|\.)\d+\.", name)[-1]  # within the layer
    cross = bool(getattr(module, "is_cross_attention", False)) or bool(_CROSS.search(inner))
    part = name[: max(0, match.start() - 2)] if match else name
    kind = "cross" if cross else "self"
    return Site(index, name, layer, part + (" cross" if cross else ""), kind)


def setting(config: Any, name: str, default: Any = None) -> Any:
    """What a config says, or the default: some configs refuse to answer for all layers at once."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default
