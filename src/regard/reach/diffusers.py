"""Capture of attention in diffusers models: every denoiser that asks for one softmax attention a
module.

Processors stay where they are. While a session is open, a hook on every attention module watches
for the one `scaled_dot_product_attention` that its processor asks for and answers it through the
handlers; all else (projections, norms, rotary positions, residuals) is the processor's own code.
So fused projections, LoRA and a user's own processors keep working, and nothing is to be restored.
Processors that compute softmax attention by hand or by xFormers give way to the stock one that
asks for it, and come back at the end. Which tokens are text, image, frames or references is told
by one table (`layouts`); a denoiser that is not in it is watched without words: `notes` says so.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
    XFormersAttnAddedKVProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0 as JointProcessor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard.core import Mask
from regard.errors import ReachError

from .call import Call, Site
from .denoising import Denoising
from .dispatch import Hook, has_handler, run, site_of
from .layouts import Layout, family, kind_of, layout, places
from .listening import listen
from .passes import TIMES, Passes

# the same softmax attention without asking for scaled_dot_product_attention -> who asks for it
STAND_IN = {
    AttnProcessor: AttnProcessor2_0,
    SlicedAttnProcessor: AttnProcessor2_0,
    XFormersAttnProcessor: AttnProcessor2_0,
    AttnAddedKVProcessor: AttnAddedKVProcessor2_0,
    SlicedAttnAddedKVProcessor: AttnAddedKVProcessor2_0,
    XFormersAttnAddedKVProcessor: AttnAddedKVProcessor2_0,
    XFormersJointAttnProcessor: JointProcessor,
}
ASKS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
# several attentions in one call, or a batch in three parts
OTHER = ("IPAdapter", "PAG")
_PARTS = ("transformer", "unet", "prior", "decoder", "denoiser")


def body(model: Any) -> Any:
    """The denoiser of a pipeline, or the denoiser itself.

    Raises:
        ReachError: a pipeline or model of another class.
    """
    if _denoises(model):
        return model
    if isinstance(model, DiffusionPipeline):
        name = type(model).__name__
        if "Pix2Pix" in name or "PAG" in name:
            raise ReachError(
                f"{name} guides its images in three parts, which regard does not tell apart: use "
                "a pipeline with plain guidance"
            )
        for part in _PARTS:
            candidate = getattr(model, part, None)
            if _denoises(candidate):
                return candidate
            if candidate is not None and part in _PARTS[:2]:
                raise ReachError(_not_reached(f"the {part} of {name}, {type(candidate).__name__},"))
        raise ReachError(_not_reached(name))
    raise ReachError(_not_reached(type(model).__name__))


def _denoises(model: Any) -> bool:
    """Whether a model takes something at a time, as denoisers do and autoencoders do not."""
    if not isinstance(model, ModelMixin):
        return False
    return any(name in inspect.signature(type(model).forward).parameters for name in TIMES)


def _not_reached(name: str) -> str:
    compiled = " (a compiled model: pass the one that was compiled)" if "Optimized" in name else ""
    return (
        f"{name} is not reached by regard{compiled}: pass a diffusion pipeline, or its denoiser "
        "(pipe.unet or pipe.transformer)"
    )


def sites(model: Any) -> list[Site]:
    """Every softmax attention of the denoiser, in order of definition; layers count as they run.

    Raises:
        ReachError: a model of another class, or a processor that computes something else.
    """
    denoiser = body(model)
    named = _attention_modules(denoiser)
    if not named:
        raise ReachError(
            f"{type(denoiser).__name__} asks for no softmax attention, so there is nothing to watch"
        )
    kinds = {name: kind_of(denoiser, name, module) for name, module in named}
    joint = any(kind == "joint" for kind, _ in kinds.values())
    order = sorted(range(len(named)), key=lambda n: _turn(named[n][0]))
    seen: dict[str, int] = {}
    by_index: dict[int, Site] = {}
    for n in order:
        name = named[n][0]
        kind, over = kinds[name]
        first = name.split(".")[0]
        part = "blocks" if first in _UNET else first
        part += f" {over}" if over and over not in part else ""
        if kind == "cross":
            part += " cross"
        elif kind == "self" and joint and not over:
            part += " self"
        text = not over and (kind == "joint" or (kind == "cross" and "time_condition" not in name))
        by_index[n] = Site(n, name, seen.get(part, 0), part, kind, text)
        seen[part] = seen.get(part, 0) + 1
    _pair(by_index)
    return [by_index[n] for n in range(len(named))]


def notes(model: Any) -> list[str]:
    """What a session does not see of this model, and what it does not know."""
    denoiser = body(model)
    name = type(denoiser).__name__
    lines = []
    if family(denoiser) is None:
        lines.append(
            f"the order of the tokens of {name} is not known to regard: its attention is watched "
            "without words"
        )
    other = [n for n, m in denoiser.named_modules() if _other(m)]
    if other:
        lines.append(
            f"{len(other)} attention modules of {name} compute no softmax attention, or compute it "
            f"by hand, and are not watched: {other[0]}" + (", ..." if other[1:] else "")
        )
    if model is not denoiser:
        beside = [n for n in ("transformer_2", "unet_2") if _denoises(getattr(model, n, None))]
        lines += [
            f"{type(model).__name__} denoises with its {n} too, which is not watched: pass it by "
            "itself"
            for n in beside
        ]
    return lines


_UNET = ("down_blocks", "mid_block", "up_blocks")


def _turn(name: str) -> int:
    first = name.split(".")[0]
    return _UNET.index(first) if first in _UNET else -1


def _pair(by_index: dict[int, Site]) -> None:
    """Cross-attention carries the layer number of the self-attention before it in its block."""
    self_layers = {
        (s.name.rsplit(".", 1)[0], s.part): s.layer for s in by_index.values() if s.kind == "self"
    }
    for n, site in by_index.items():
        block = (site.name.rsplit(".", 1)[0], site.part.removesuffix(" cross"))
        if site.kind == "cross" and block in self_layers:
            by_index[n] = replace(site, layer=self_layers[block])


# -- which modules attend --------------------------------------------------------------------------
def _attention_modules(denoiser: Any) -> list[tuple[str, Any]]:
    """The modules that ask for a softmax attention, or whose stand-in does.

    Raises:
        ReachError: a processor that computes something else.
    """
    attending = []
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            if ASKS & _names(type(module), "forward"):
                attending.append((name, module))
        elif not _linear(processor):
            _check(name, module)
            attending.append((name, module))
    return attending


def _check(name: str, module: Any) -> None:
    processor = getattr(module, "processor", None)
    if processor is None:
        return
    kind = type(processor)
    if kind in STAND_IN and (kind is not SlicedAttnProcessor or _plain(module)):
        return
    # a user's own may hand on to the stock one that it is made from
    asks = any(_names(c, "__call__") & ASKS for c in kind.__mro__)
    if not asks or any(word in c.__name__ for word in OTHER for c in kind.__mro__):
        raise ReachError(
            f"{name} runs the processor {kind.__name__}, which computes something else than one "
            "scaled_dot_product_attention, so regard cannot stand in for it: take it off first "
            "(set_attn_processor, or unload the adapter that brought it)"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ReachError(
            f"{name} runs context parallel, which regard does not follow: disable it first"
        )


def _linear(processor: Any) -> bool:
    """Attention without a softmax (Sana): there is no map of weights to see."""
    return any("Linear" in c.__name__ for c in type(processor).__mro__)


def _other(module: Any) -> bool:
    """Whether a module attends in a way of its own."""
    processor = getattr(module, "processor", None)
    if processor is not None:
        return _linear(processor)
    return "Attention" in type(module).__name__ and "softmax" in _names(type(module), "forward")


def _names(kind: type, method: str) -> set[str]:
    """The names that the class's own method speaks of."""
    code = getattr(inspect.unwrap(vars(kind).get(method, len)), "__code__", None)
    return set() if code is None else _spoken(code)


def _spoken(code: CodeType) -> set[str]:
    inner = [_spoken(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _plain(module: Any) -> bool:
    return getattr(module, "added_kv_proj_dim", None) is None


@dataclass
class _Open:
    """One denoiser under one or more sessions."""

    denoiser: Any
    passes: Passes = field(default_factory=Passes)
    sessions: int = 0
    undo: list[Callable[[], Any]] = field(default_factory=list)
    kinds: dict[int, tuple[str, str]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    layout: Layout | None = None
    # by frames attended one by one: the rows of a call, moved once a forward, since a look at
    # values would make a GPU wait in every attention
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    watches: list[Any] = field(default_factory=list)


_open: dict[int, _Open] = {}


def enter(model: Any) -> Callable[[], None]:
    """Route the denoiser's attention through regard; returns what undoes it."""
    denoiser = body(model)
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in denoiser.modules()):
        raise ReachError(
            f"this {type(denoiser).__name__} is compiled, which hides its attention: load it "
            "without compile()"
        )
    state = _open.get(id(denoiser))
    if state is None:
        state = _Open(denoiser)
        try:
            _hook(state)
        except BaseException:
            _close(state)
            raise
        _open[id(denoiser)] = state
    state.sessions += 1
    if model is not denoiser and state.passes.pipeline is None:
        state.passes.pipeline = model
        state.undo.append(listen(model, denoiser, state.passes.tell))

    def leave() -> None:
        state.sessions -= 1
        if not state.sessions:
            del _open[id(denoiser)]
            _close(state)

    return leave


def _close(state: _Open) -> None:
    _end_watches(state)
    while state.undo:
        state.undo.pop()()


def makes_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Denoisers keep no keys and values from step to step."""
    return False


def new_cache(model: Any) -> Any:
    raise ReachError("denoisers have no key-value cache")


def _hook(state: _Open) -> None:
    state.names = list(inspect.signature(type(state.denoiser).forward).parameters)[1:]
    first = state.denoiser.register_forward_pre_hook(
        Hook(lambda _, args, kwargs: _begin(state, args, kwargs)), with_kwargs=True
    )
    state.undo.append(first.remove)
    for name, module in _attention_modules(state.denoiser):
        state.kinds[id(module)] = kind_of(state.denoiser, name, module)
        _stand_in(state, module)
        before = module.register_forward_pre_hook(
            Hook(lambda m, args, kwargs: _watch(state, m, args, kwargs)), with_kwargs=True
        )
        after = module.register_forward_hook(
            Hook(lambda m, args, out: _unwatch(state, m, out)), always_call=True
        )
        state.undo += [before.remove, after.remove]


def _stand_in(state: _Open, module: Any) -> None:
    """Run the stock processor in place of one that computes the same without asking."""
    processor = getattr(module, "processor", None)
    if type(processor) in STAND_IN:
        new = STAND_IN[type(processor)]()
    elif processor is not None and getattr(processor, "_attention_backend", None) not in (
        None,
        AttentionBackendName.NATIVE,
    ):
        # another kernel of the same softmax attention
        new = copy.copy(processor)
        new._attention_backend = AttentionBackendName.NATIVE
    else:
        return
    # straight into place: set_processor would log, and drop a processor that is a module
    _put(module, new)

    def back() -> None:
        if module.processor is new:
            _put(module, processor)

    state.undo.append(back)


def _put(module: Any, processor: Any) -> None:
    module._modules.pop("processor", None)
    module.__dict__.pop("processor", None)
    module.processor = processor


# -- the forward of the denoiser ------------------------------------------------------------------
def _begin(state: _Open, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _end_watches(state)
    all_given = {**dict(zip(state.names, args)), **kwargs}
    given = {name: all_given[name] for name in state.names if name in all_given}
    known = family(state.denoiser)
    text = given.get(known.text[0] if known is not None else "encoder_hidden_states")
    state.passes.begin(given, given[state.names[0]], text)
    state.layout = layout(state.denoiser, given)
    state.rows = {}


# -- the forward of one attention module ----------------------------------------------------------
class _Asked(Exception):
    """Carries keys and values out of a processor that was only asked for them."""


class _Watch(TorchFunctionMode):
    """Answers the scaled_dot_product_attention of one attention module."""

    def __init__(self, state: _Open, module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        super().__init__()
        self.state, self.module, self.args, self.kwargs = state, module, args, kwargs
        self.calls = 0
        self.answers: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self.answers:
            return self.answers.pop(0)
        self.calls += 1
        asked = {**dict(zip(_ASKED, args)), **(kwargs or {})}
        given = (*self.args, *self.kwargs.values())
        batch = next((len(x) for x in given if isinstance(x, Tensor)), 1)
        if len(asked["query"]) == 1 < batch:
            return self._by_rows(batch, asked)
        return _attention(self, **asked)

    def _by_rows(self, batch: int, asked: dict[str, Any]) -> Tensor:
        """A processor that asks for each row of the batch, without the padding (Mochi): the rows
        are gathered, by running it once before, into one call.
        """
        with _Gather() as gather:
            type(self.module).forward(self.module, *self.args, **self.kwargs)
        rows = gather.calls
        if len(rows) != batch or any(r.get("attn_mask") is not None for r in rows):
            return _attention(self, **asked)
        live = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(r["key"].shape[2], dtype=torch.bool) for r in rows], batch_first=True
        ).to(asked["key"].device)
        joined: dict[str, Any] = {
            name: torch.cat(
                [F.pad(r[name], (0, 0, 0, live.shape[1] - r[name].shape[2])) for r in rows]
            )
            for name in _ASKED[:3]
        }
        joined |= {"attn_mask": live[:, None, None], "scale": asked.get("scale")}
        out = _attention(self, **joined, live=None if bool(live.all()) else live)
        self.answers = [out[n : n + 1, :, : r["query"].shape[2]] for n, r in enumerate(rows)]
        return self.answers.pop(0)


_ASKED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


class _Gather(TorchFunctionMode):
    """Notes what a processor asks for, and lets it have it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append({**dict(zip(_ASKED, args)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


class _Keys(TorchFunctionMode):
    """Ends a processor at its attention, with its keys and values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args)), **(kwargs or {})}
            raise _Asked(given["key"], given["value"])
        return func(*args, **(kwargs or {}))


@torch.compiler.disable
def _watch(state: _Open, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not has_handler(module):
        return  # it runs as it is
    watch = _Watch(state, module, args, kwargs)
    watch.__enter__()
    state.watches.append(watch)


@torch.compiler.disable
def _unwatch(state: _Open, module: Any, out: Any) -> None:
    if not state.watches or state.watches[-1].module is not module:
        return  # the forward ended before our own hook began
    watch = state.watches.pop()
    watch.__exit__(None, None, None)
    if out is not None and watch.calls != 1:
        site = site_of(module)
        raise ReachError(
            f"the processor {type(getattr(module, 'processor', module)).__name__} of "
            f"{site.name if site else 'an attention module'} asked for {watch.calls} attentions "
            "where regard stands in for one: take it off first (set_attn_processor)"
        )


def _end_watches(state: _Open) -> None:
    """End what an interrupt left on: after a KeyboardInterrupt torch runs no hook, even one that is
    always called, and a watch would go on answering the attention of others.
    """
    while state.watches:
        state.watches.pop().__exit__(None, None, None)


def _attention(
    watch: _Watch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    live: Tensor | None = None,
) -> Tensor:
    """The signature of `scaled_dot_product_attention`, answered through the handlers; `live` tells
    queries from padding.
    """
    site = site_of(watch.module)
    if site is None:
        raise ReachError("an attention module ran that no open session knows: open it anew")
    if dropout_p:
        raise ReachError("attention dropout is on: set it to 0 before watching")
    mask, bias = (Mask.causal(), None) if is_causal else _mask(attn_mask, query, key)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    call = Call(
        site, query, key, value, mask, factor, bias=bias, live=live,
        denoising=_place(watch, site, query, key),
    )  # fmt: skip
    return run(watch.module, call).out.to(query.dtype)


def _mask(given: Tensor | None, q: Tensor, k: Tensor) -> tuple[Mask, Tensor | None]:
    from .handed import from_tensor

    if given is None:
        return Mask.full(), None
    while given.dim() < 4:
        given = given[None]
    if given.dtype == torch.bool and given.shape[1] == given.shape[2] == 1:
        return Mask.padding(given[:, 0, 0].expand(-1, k.shape[2])), None
    given = given.expand(*given.shape[:2], q.shape[2], k.shape[2])
    if given.dtype != torch.bool and not bool(given.any()):
        return Mask.full(), None
    return from_tensor(given)


def _place(watch: _Watch, site: Site, q: Tensor, k: Tensor) -> Denoising:
    state, module = watch.state, watch.module
    seen, passes = state.layout, state.passes
    assert seen is not None
    kind, over = state.kinds[id(module)]
    added_kv = kind == "cross" and "AddedKV" in type(getattr(module, "processor", None)).__name__
    added_kv = (
        added_kv and k.shape[2] > q.shape[2] and not getattr(module, "only_cross_attention", False)
    )
    at = places(seen, kind, over, added_kv, (q.shape[0], q.shape[2], k.shape[2]))
    rows, index = _rows(state, at.frames, q)
    return Denoising(
        passes.run,
        passes.step,
        passes.timestep,
        rows,
        index,
        at.grid,
        at.image,
        at.text,
        passes.prompts,
        _projection(watch) if kind == "cross" and not added_kv else None,
        at.frames,
        at.image_keys,
        at.text_queries,
        at.reference,
        seen.unknown,
    )


def _rows(state: _Open, frames: int, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of a call the prompt drives, and their numbers."""
    rows = state.passes.rows
    if rows is None or len(rows) * frames != len(q):
        return None, None
    if frames not in state.rows:
        every = rows.repeat_interleave(frames)
        state.rows[frames] = every.to(q.device), every.nonzero()[:, 0].to(q.device)
    return state.rows[frames]


def _projection(watch: _Watch) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Let the processor itself make keys and values of another context."""
    module = watch.module

    def project(context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = watch.args[0] if watch.args else watch.kwargs["hidden_states"]
        token = hidden[:1, :1].expand(len(context), 1, hidden.shape[-1])
        kwargs = {n: v for n, v in watch.kwargs.items() if n not in ("hidden_states",)}
        known = inspect.signature(module.processor.__call__).parameters
        kwargs = {n: v for n, v in kwargs.items() if n in known}
        kwargs |= {"encoder_hidden_states": context, "attention_mask": None}
        try:
            with _Keys():
                module.processor(module, token, **kwargs)
        except _Asked as asked:
            return asked.args
        raise ReachError(f"{type(module.processor).__name__} asked for no attention")

    return project
