"""The door into transformers models: one attention function and one mask function under the name
"regard".
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from regard.core import Mask
from regard.errors import ReachError

from .call import Call, Site
from .dispatch import run, site_of
from .masks import from_mask_function

NAME = "regard"
# attention functions that compute the softmax attention which regard computes too
SOFTMAX = {"eager", "sdpa", "flex_attention", NAME, None} | {
    f"flash_attention_{n}" for n in (2, 3, 4)
}
# id of a config -> what it named before each of its open sessions; not kept in the config, which is
# saved and copied with the model
_before: dict[int, list[str | None]] = {}
_CROSS = re.compile(r"cross|enc_?dec|encoder_?attn", re.IGNORECASE)


class Handed(Tensor):
    """What our mask function hands to our attention function in place of a dense mask.

    transformers passes masks on as 4-D tensors, so this is one: a single stored number seen as
    `[batch, 1, queries, keys]`, that carries the description and survives being moved or made
    contiguous.
    """

    mask: Mask
    live: Tensor | None
    query_offset: int
    key_offset: int

    @staticmethod
    def of(
        mask: Mask, live: Tensor | None, offsets: tuple[int, int], shape: tuple[int, int, int]
    ) -> Handed:
        batch, queries, keys = shape
        plain = torch.zeros((), dtype=torch.bool).expand(batch, 1, queries, keys)
        handed = plain.as_subclass(Handed)
        handed.mask, handed.live = mask, live
        handed.query_offset, handed.key_offset = offsets
        return handed

    def contiguous(self, *args: Any, **kwargs: Any) -> Handed:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Handed:
        return self


def sites(model: Any) -> list[Site]:
    """Every attention module of the model that asks the `AttentionInterface`, in order of
    definition.

    Raises:
        ReachError: the model is not a transformers model, or none of its modules asks the
            interface.
    """
    if not isinstance(model, PreTrainedModel):
        held = [n for n in ("_orig_mod", "module", "model") if hasattr(model, n)]
        raise ReachError(
            f"{type(model).__name__} is not a transformers model: pass the PreTrainedModel itself "
            f"(of a wrapper, its .{held[0] if held else 'model'})"
        )
    found: list[Site] = []
    asking = [(name, m) for name, m in model.named_modules() if _asks_interface(m)]
    for name, module in asking:
        # ALBERT runs several layers through one module
        groups = getattr(model.config, "num_hidden_groups", None)
        turns = model.config.num_hidden_layers // groups if groups else 1
        for turn in range(turns):
            site = _site(len(found), name, module)
            found.append(replace(site, layer=site.layer * turns + turn))
    if not found:
        raise ReachError(
            f"{type(model).__name__} computes attention by itself or has none, and never asks "
            "transformers' AttentionInterface, so regard cannot reach it: use a model class of "
            "transformers 5 that does"
        )
    return found


def enter(model: PreTrainedModel) -> Callable[[], None]:
    """Route the attention of the model through regard; returns what undoes it."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    configs: dict[int, Any] = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    own = {c._attn_implementation for c in configs.values()}
    foreign = {
        name
        for name in own
        if name not in SOFTMAX and not str(name).startswith(("paged|", "kernels-community"))
    }
    if foreign:
        raise ReachError(
            f"the model runs its own attention {sorted(map(str, foreign))}, which regard would "
            'replace by plain softmax attention: load it with attn_implementation="sdpa", or '
            "watch it without that method"
        )
    for key, config in configs.items():
        _before.setdefault(key, []).append(config._attn_implementation)
        config._attn_implementation_internal = NAME

    def leave() -> None:
        # sessions may end in any order: the implementation returns when the last one leaves
        for key, config in configs.items():
            first = _before[key][0]
            _before[key].pop()
            if not _before[key]:
                del _before[key]
                if config._attn_implementation == NAME:  # else somebody chose anew in between
                    config._attn_implementation_internal = first

    return leave


def makes_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this forward pass, called without a cache, makes one and returns it."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    config = model.config.get_text_config(decoder=True)
    wanted = kwargs.get("use_cache")
    return (
        "past_key_values" in names[len(args) :]
        and model.can_generate()
        and not getattr(model.config, "is_encoder_decoder", False)
        and bool(getattr(config, "use_cache", False) if wanted is None else wanted)
    )


def new_cache(model: Any) -> DynamicCache:
    """The cache that transformers' own models make when they are given none."""
    return DynamicCache(config=model.config)


def _asks_interface(module: Any) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _site(index: int, name: str, module: Any) -> Site:
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


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = None,
    **kwargs: Any,
) -> Handed:
    """transformers' mask factories call this with a rule and a padding mask; no matrix is built."""
    assert mask_function is not None
    first, start = int(q_offset), int(kv_offset)
    # a static cache is longer than what it holds: the call sees the keys up to its last query
    keys = min(kv_length, first + q_length - start) if _looks_back(mask_function) else kv_length
    mask = from_mask_function(
        mask_function,
        batch_size,
        q_length,
        keys,
        first,
        start,
        bool(kwargs.get("use_vmap")),
        device,
    )
    live = None
    if attention_mask is not None:
        padded = torch.nn.functional.pad(
            attention_mask.bool(), (0, max(0, start + keys - attention_mask.shape[-1]))
        )
        seen = padded[:, start : start + keys]
        if not bool(seen.all()):
            mask = mask & Mask.padding(seen)
        live = padded[:, first : first + q_length]
        if live.shape[1] != q_length or bool(live.all()):
            live = None
    return Handed.of(mask, live, (first, start), (batch_size, q_length, keys))


def _looks_back(mask_function: Callable[..., Any]) -> bool:
    from transformers.masking_utils import bidirectional_mask_function

    return mask_function is not bidirectional_mask_function


@torch.compiler.disable
def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; the output is `[batch, queries, heads, head_dim]`."""
    if dropout:
        raise ReachError(
            "attention dropout is on: call model.eval(), or set attention_dropout to 0"
        )
    if kwargs.get("cache") is not None:
        raise ReachError(
            "paged attention caches are not supported under regard: use model.generate without them"
        )
    if kwargs.get("output_attentions"):
        raise ReachError(
            "output_attentions=True asks for the whole attention matrix: drop it and name facts "
            'instead, for example regard.watch(model, facts=["received", "thumbnail"])'
        )
    site = site_of(module) or _site(0, type(module).__name__, module)
    q_length = query.shape[2]
    mask, bias, live, offsets = Mask.full(), position_bias, None, (0, 0)
    if isinstance(attention_mask, Handed):
        if not hasattr(attention_mask, "mask"):
            raise ReachError(
                f"{site.name} cuts or changes its attention mask on the way, which regard cannot "
                "follow"
            )
        mask, offsets = (
            attention_mask.mask,
            (attention_mask.query_offset, attention_mask.key_offset),
        )
        if site.kind == "self":
            live = attention_mask.live
        # the mask knows how many keys there are; a module outside the session does not know whether
        # it looks across
        end = attention_mask.shape[-1]
        if end < key.shape[2]:
            key, value = key[:, :, :end], value[:, :, :end]
            bias = None if bias is None else bias[..., :end]
    elif attention_mask is not None:
        mask, extra = _from_tensor(attention_mask[..., : key.shape[2]])
        bias = extra if bias is None else bias if extra is None else bias + extra
        offsets = (key.shape[2] - q_length if site.kind == "self" else 0, 0)
    else:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if causal and q_length > 1 and site.kind == "self":
            mask = Mask.causal()
            if (
                key.shape[2] > q_length
            ):  # an empty static cache: the keys past the queries are not there yet
                key, value = key[:, :, :q_length], value[:, :, :q_length]
        offsets = (key.shape[2] - q_length if site.kind == "self" else 0, 0)
    if bias is not None:
        bias = bias.expand(*bias.shape[:2], q_length, key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = Call(site, query, key, value, mask, scale, softcap, bias, s_aux, live, *offsets)
    state = run(module, call)
    return state.out.to(query.dtype).transpose(1, 2).contiguous(), None


def _from_tensor(tensor: Tensor) -> tuple[Mask, Tensor | None]:
    """A ready 4-D mask: boolean, or additive with the dtype's lowest value where it hides."""
    if tensor.dtype == torch.bool:
        return Mask.dense(tensor), None
    allowed = tensor > torch.finfo(tensor.dtype).min / 2
    plain = bool((tensor.masked_fill(~allowed, 0) == 0).all())
    mask = Mask.full() if bool(allowed.all()) else Mask.dense(allowed)
    return mask, None if plain else tensor.masked_fill(~allowed, 0)
