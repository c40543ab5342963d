"""Capture of attention in transformers models: while a session is open, `AttentionInterface` and
`AttentionMaskInterface` hand out functions of ours around those that the model asks for.

The model's own settings stay as they are, so that a model that looks at the name of its attention
meets the name it expects, and everybody else - other threads, other models - gets the function
asked for.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from regard.core import Mask
from regard.errors import ReachError

from . import dispatch, generation
from .call import Call
from .handed import Handed, drowned, from_tensor, note_text, origin_of, padding_of_text
from .masks import from_mask_function
from .sites import asks, site_like, sites, unwrapped
from .softmax import follow
from .verify import verify

__all__ = ["Handed", "enter", "makes_cache", "new_cache", "sites", "unwrapped"]

# attention functions that compute the softmax attention which regard computes too
SOFTMAX = {"eager", "sdpa", "flex_attention", None} | {f"flash_attention_{n}" for n in (2, 3, 4)}
# keywords of attention functions that change nothing which regard does not know by other means
_KNOWN = frozenset(
    (
        *("module", "query", "key", "value", "query_states", "key_states", "value_states"),
        *("attention_mask", "scaling", "dropout", "is_causal", "sliding_window", "softcap"),
        *("s_aux", "sinks", "position_bias", "cache", "output_attentions", "kwargs"),
    )
)
# what kernels of sparse attention read, where the model leaves it out of the mask
_PICKS = ("indices", "block_indices")


_lock = threading.Lock()
_open = 0  # sessions of all threads
_configs: Counter[type] = Counter()  # classes of the configs of their models
_followed: dict[int, tuple[int, Callable[[], None]]] = {}  # modules that attend by themselves


def enter(model: PreTrainedModel) -> Callable[[], None]:
    """Route the attention of the model through regard; returns what undoes it."""
    configured: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    configured = [c for c in configured if hasattr(c, "_attn_implementation")]
    foreign = {
        name
        for name in {c._attn_implementation for c in configured}
        if name not in SOFTMAX and not str(name).startswith(("paged|", "kernels-community"))
    }
    if foreign:
        raise ReachError(
            f"the model runs its own attention {sorted(map(str, foreign))}, which regard would "
            'replace by plain softmax attention: load it with attn_implementation="sdpa", or '
            "watch it without that method"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    unregistered = list({id(m): m for s in sites(model) if not asks(m := modules[s.name])}.values())
    configs = {type(c) for c in configured}  # some models keep a config for every layer
    _count(1, configs, unregistered)
    return lambda: _count(-1, configs, unregistered)


def _count(more: int, configs: set[type], unregistered: list[Any]) -> None:
    """Stand before the two interfaces from the first session to the last."""
    global _open
    with _lock:
        for key in configs:
            _configs[key] += more
            if not _configs[key]:
                del _configs[key]
        for module in unregistered:
            count, leave = _followed.pop(id(module), (0, None))
            leave = leave or follow(module)
            if count + more:
                _followed[id(module)] = (count + more, leave)
            else:
                leave()
        before, _open = _open, _open + more
        if not before:
            AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign,assignment]
            AttentionInterface.__getitem__ = _get_function  # type: ignore[method-assign]
            AttentionMaskInterface.__getitem__ = _get_mask  # type: ignore[method-assign]
            generation.follow()
        elif not _open:
            AttentionInterface.get_interface = _plain_interface  # type: ignore[method-assign]
            del AttentionInterface.__getitem__, AttentionMaskInterface.__getitem__
            generation.leave()


_plain_interface = AttentionInterface.get_interface


def _get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    return _around(_plain_interface(self, name, default))


def _get_function(self: Any, name: str) -> Callable[..., Any]:
    return _around(super(AttentionInterface, self).__getitem__(name))


def _get_mask(self: Any, name: str) -> Callable[..., Any]:
    plain: Callable[..., Any] = super(AttentionMaskInterface, self).__getitem__(name)
    return functools.partial(_mask, plain, name) if dispatch.watched() else plain


@torch.compiler.disable
def _around(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Our attention function around the one that was asked for, where this thread watches."""
    if not dispatch.watched() or getattr(plain, "func", None) is _attention:
        return plain
    return functools.partial(_attention, plain)


def makes_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this forward pass, called without a cache, makes one and returns it."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    config = model.config.get_text_config(decoder=True)
    use_cache = kwargs.get("use_cache")
    return (
        "past_key_values" in names[len(args) :]
        and model.can_generate()
        and not getattr(model.config, "is_encoder_decoder", False)
        and bool(getattr(config, "use_cache", False) if use_cache is None else use_cache)
    )


def new_cache(model: Any) -> DynamicCache:
    """The cache that transformers' own models make when they are given none."""
    return DynamicCache(config=model.config)


@torch.compiler.disable
def _mask(
    plain: Callable[..., Any],
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = None,
    **kwargs: Any,
) -> Any:
    """transformers' mask factories call this with a rule and a padding mask; no matrix is built."""

    def whole(skip: bool) -> Any:
        given = dict(kwargs)
        if not skip:
            given |= {n: False for n in given if n.startswith("allow_is_")}
        return plain(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **given,
        )

    if type(kwargs.get("config")) not in _configs or mask_function is None:
        return whole(True)  # of a model that nobody watches
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
    dtype = kwargs.get("dtype", torch.float32) if name == "eager" else torch.bool
    like = torch.empty(0, dtype=dtype, device=device)
    handed = Handed.of(mask, live, (first, start), (batch_size, q_length, keys), whole, like)
    handed.origin.width = kv_length
    if _looks_back(mask_function):
        note_text(handed.origin)
    return handed


def _looks_back(mask_function: Callable[..., Any]) -> bool:
    from transformers.masking_utils import bidirectional_mask_function

    return mask_function is not bidirectional_mask_function


@torch.compiler.disable
def _attention(
    plain: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """transformers' attention signature; the output is `[batch, queries, heads, head_dim]`."""
    handed = attention_mask if isinstance(attention_mask, Handed) else None
    if not dispatch.acts_on(module):
        real = attention_mask if handed is None or handed.plain is None else handed.plain(True)
        result: tuple[Tensor, Any] = plain(module, query, key, value, real, *args, **kwargs)
        return result
    names = list(inspect.signature(plain).parameters)[5:] if args else []
    given = {**dict(zip(names, args)), **kwargs}
    if not query.dtype == key.dtype == value.dtype:  # under autocast, where the model's own casts
        narrow = min((query, key, value), key=lambda x: x.dtype.itemsize).dtype
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    call = _call(plain, module, query, key, value, attention_mask, given)
    verify(call, module, plain, (query, key, value), attention_mask, given)
    state = dispatch.run(module, call)
    return state.out.to(query.dtype).transpose(1, 2).contiguous(), None


def _call(
    plain: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    given: dict[str, Any],
) -> Call:
    """What a model hands to its attention function, as a `Call`."""
    site = dispatch.site_of(module) or site_like(0, type(module).__name__, module)
    _refuse(plain, module, site.name, given)
    q_length, origin, end, joint = query.shape[2], None, key.shape[2], False
    mask, bias, live, offsets = Mask.full(), given.get("position_bias"), None, (0, 0)
    if isinstance(attention_mask, Handed):
        mask, origin = attention_mask.mask, attention_mask.origin
        # a mask narrower than the keys fits no attention: the plain model has none there, and a
        # bidirectional one that reads a cache looks at all of it
        end = origin.shape[2] if key.shape[2] <= origin.width else key.shape[2]
    elif attention_mask is not None:
        origin = origin_of(attention_mask, q_length) if site.kind == "self" else None
        # the mask knows how many keys there are
        end = attention_mask.shape[-1]
        padding = attention_mask.shape[-2] == 1 < q_length == end and site.kind == "self"
        if origin is not None and origin.width == end:
            end = origin.shape[2]
        joint = origin is not None and end > origin.width
        attention_mask = attention_mask[..., : min(end, key.shape[2])]
        attention_mask = attention_mask.expand(-1, -1, q_length, -1)
        lost = drowned(attention_mask)
        query = query.masked_fill(lost, 0) if bool(lost.any()) else query
        mask, extra = from_tensor(attention_mask)
        if padding:  # one row for all queries
            live = mask.cells(q_length, end)[:, 0, 0]
        elif site.kind == "self" and bool(lost.any()):
            live = ~lost[..., 0].all(1)
        bias = extra if bias is None else bias if extra is None else bias + extra
        key, value = key[:, :, :end], value[:, :, :end]
    else:
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal and q_length > 1:
            mask = Mask.causal()
            # an empty static cache: the keys past the queries are not there yet
            key, value = key[:, :, :q_length], value[:, :, :q_length]
    if origin is not None:
        # the mask of a bidirectional model does not count what the cache holds
        held = site.kind == "self" and (dispatch.past_of(module) or 0) + q_length == end
        beyond = end > origin.width and not joint
        first = end - q_length if held or beyond else origin.offsets[0]
        offsets = (first, origin.offsets[1] if origin.shape[2] == end else 0)
        key, value = key[:, :, :end], value[:, :, :end]
        live = origin.live
        if live is not None and first != origin.offsets[0]:  # read at the wrong place
            live = mask.cells(1, end)[:, 0, 0, first:]
    elif site.kind == "self":
        offsets = (key.shape[2] - q_length, 0)
    if site.kind == "cross":
        live = padding_of_text(len(query), q_length)
    if live is not None and len(live) < len(query):  # one mask for all rows
        live = live.expand(len(query), -1)
    live = dispatch.without_ended(live, len(query), q_length)
    if bias is not None:
        bias = bias[..., : key.shape[2]]
        bias = bias.expand(*bias.shape[:2], q_length, key.shape[2])
    scale = given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    sinks = given.get("s_aux")
    if given.get("sinks") is not None:  # of every query: [batch, heads, queries, 1]
        sinks = given["sinks"][..., 0].expand(query.shape[:3])
    softcap = given.get("softcap")
    return Call(
        site, query, key, value, mask, scale, softcap, bias, sinks, live, *offsets, joint=joint
    )


def _refuse(plain: Callable[..., Any], module: Any, name: str, given: dict[str, Any]) -> None:
    """Refuse what no `Call` can say."""
    if given.get("dropout"):
        raise ReachError(
            "attention dropout is on: call model.eval(), or set attention_dropout to 0"
        )
    if given.get("cache") is not None:
        raise ReachError(
            "paged attention caches are not supported under regard: use model.generate without them"
        )
    if given.get("output_attentions"):
        raise ReachError(
            "output_attentions=True asks for the whole attention matrix: drop it and name facts "
            'instead, for example regard.watch(model, facts=["received", "thumbnail"])'
        )
    # a keyword that the model's own function reads and we do not, or that picks keys where the
    # model leaves them out of the mask
    asked = set(inspect.signature(plain).parameters) - _KNOWN
    if module.config._attn_implementation not in ("eager", "sdpa"):
        asked |= set(_PICKS)
    unknown = sorted(n for n in asked if given.get(n) is not None)
    if unknown:
        raise ReachError(
            f"{name} hands {unknown[0]}= to its attention, which regard does not know: load the "
            'model with attn_implementation="sdpa", or report the class of this model'
        )
