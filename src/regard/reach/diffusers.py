"""The door into diffusers models: UNets with cross-attention, SD3's and Flux's joint attention.

Processors stay where they are. While a session is open, a hook on every attention module watches
for the one `scaled_dot_product_attention` that its processor asks for and answers it through the
handlers; all else (projections, norms, rotary positions, residuals) is the processor's own code.
So fused projections, LoRA and a user's own processors keep working, and nothing is to be restored.
Processors that compute softmax attention by hand or by xFormers give way to the stock one that
asks for it, and come back at the end.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0 as JointProcessor
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard.core import Mask
from regard.errors import ReachError

from .call import Call, Site
from .denoising import Denoising, Prompts
from .dispatch import Hook, run, site_of

ATTENTION = (Attention, FluxAttention)
DENOISERS = (UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel)
# the same softmax attention without asking for scaled_dot_product_attention -> who asks for it
STAND_IN = {
    AttnProcessor: AttnProcessor2_0,
    SlicedAttnProcessor: AttnProcessor2_0,
    XFormersAttnProcessor: AttnProcessor2_0,
    XFormersJointAttnProcessor: JointProcessor,
}
ASKS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
# several attentions in one call, or a batch in three parts
OTHER = ("IPAdapter", "PAG", "AddedKV", "Linear")
_SUPPORTED = (
    "Stable Diffusion 1, 2 and XL (UNet2DConditionModel), Stable Diffusion 3 "
    "(SD3Transformer2DModel) and Flux (FluxTransformer2DModel)"
)


def body(model: Any) -> Any:
    """The denoiser of a pipeline, or the denoiser itself.

    Raises:
        ReachError: a pipeline or model of another class.
    """
    if isinstance(model, DENOISERS):
        return model
    if isinstance(model, DiffusionPipeline):
        name = type(model).__name__
        if "Pix2Pix" in name or "PAG" in name:
            raise ReachError(
                f"{name} guides its images in three parts, which regard does not tell apart: use "
                f"a pipeline of {_SUPPORTED} with plain guidance"
            )
        for part in ("unet", "transformer"):
            found = getattr(model, part, None)
            if isinstance(found, DENOISERS):
                return found
            if found is not None:
                raise ReachError(_not_reached(f"the {part} of {name}, {type(found).__name__},"))
        raise ReachError(_not_reached(name))
    raise ReachError(_not_reached(type(model).__name__))


def _not_reached(name: str) -> str:
    compiled = " (a compiled model: pass the one that was compiled)" if "Optimized" in name else ""
    return f"{name} is not reached by regard{compiled}: pass a pipeline of {_SUPPORTED}"


def sites(model: Any) -> list[Site]:
    """Every attention module of the denoiser, in order of definition; layers count as they run.

    Raises:
        ReachError: a model of another class, or a processor that computes something else.
    """
    denoiser = body(model)
    named = [(n, m) for n, m in denoiser.named_modules() if isinstance(m, ATTENTION)]
    for name, module in named:
        _check(name, module)
    unet = isinstance(denoiser, UNet2DConditionModel)
    order = sorted(range(len(named)), key=lambda n: _turn(named[n][0]) if unet else n)
    seen: dict[str, int] = {}
    found: dict[int, Site] = {}
    for n in order:
        name, module = named[n]
        if unet:
            kind = "cross" if module.is_cross_attention else "self"
            part = "blocks cross" if kind == "cross" else "blocks"
        else:
            kind = "self" if name.endswith("attn2") else "joint"
            part = name.split(".")[0] + (" self" if kind == "self" else "")
        found[n] = Site(n, name, seen.get(part, 0), part, kind)
        seen[part] = seen.get(part, 0) + 1
    if unet:
        _pair(found)
    return [found[n] for n in range(len(named))]


def _turn(name: str) -> int:
    return ("down_blocks", "mid_block", "up_blocks").index(name.split(".")[0])


def _pair(found: dict[int, Site]) -> None:
    """Cross-attention carries the layer number of the self-attention before it in its block."""
    own = {s.name.rsplit(".", 1)[0]: s.layer for s in found.values() if s.kind == "self"}
    for n, site in found.items():
        block = site.name.rsplit(".", 1)[0]
        if site.kind == "cross" and block in own:
            found[n] = replace(site, layer=own[block])


def _check(name: str, module: Any) -> None:
    processor = module.processor
    kind = type(processor)
    if kind in STAND_IN and (kind is not SlicedAttnProcessor or _plain(module)):
        return
    # a user's own may hand on to the stock one that it is made from
    asks = any(_names(c) & ASKS for c in kind.__mro__)
    if not asks or any(word in c.__name__ for word in OTHER for c in kind.__mro__):
        raise ReachError(
            f"{name} runs the processor {kind.__name__}, which computes something else than one "
            "scaled_dot_product_attention, so regard cannot stand in for it: take it off first "
            "(set_attn_processor, or unload the adapter that brought it)"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ReachError(
            f"{name} runs context parallel, which regard does not follow: disable it for the look"
        )


def _names(kind: type) -> set[str]:
    """The names that the class's own `__call__` speaks of."""
    code = getattr(inspect.unwrap(vars(kind).get("__call__", len)), "__code__", None)
    return set() if code is None else set(code.co_names)


def _plain(module: Any) -> bool:
    return getattr(module, "added_kv_proj_dim", None) is None


@dataclass
class _Open:
    """One denoiser under one or more sessions."""

    denoiser: Any
    sessions: int = 0
    undo: list[Callable[[], Any]] = field(default_factory=list)
    pipeline: Any = None
    encoded: list[Prompts] = field(default_factory=list)
    prompts: Prompts | None = None
    schedule: Any = None
    run: int = -1
    step: int = -1
    timestep: float = 0.0
    rows: Tensor | None = None
    index: Tensor | None = None
    size: tuple[int, int] | None = None
    text: int = 0
    sample: Any = None
    watches: list[Any] = field(default_factory=list)


_open: dict[int, _Open] = {}


def enter(model: Any) -> Callable[[], None]:
    """Route the denoiser's attention through regard; returns what undoes it."""
    denoiser = body(model)
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in denoiser.modules()):
        raise ReachError(
            f"this {type(denoiser).__name__} is compiled, which hides its attention: load it "
            "without compile() for the look"
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
    if model is not denoiser and state.pipeline is None:
        state.pipeline = model
        _listen(state, model)

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
    first = state.denoiser.register_forward_pre_hook(
        Hook(lambda _, args, kwargs: _begin(state, args, kwargs)), with_kwargs=True
    )
    state.undo.append(first.remove)
    for name, module in state.denoiser.named_modules():
        if not isinstance(module, ATTENTION):
            continue
        _check(name, module)
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
    own = module.processor
    if type(own) in STAND_IN:
        new = STAND_IN[type(own)]()
    elif getattr(own, "_attention_backend", None) not in (None, AttentionBackendName.NATIVE):
        # another kernel of the same softmax attention
        new = copy.copy(own)
        new._attention_backend = AttentionBackendName.NATIVE
    else:
        return
    # straight into place: set_processor would log, and drop a processor that is a module
    _put(module, new)

    def back() -> None:
        if module.processor is new:
            _put(module, own)

    state.undo.append(back)


def _put(module: Any, processor: Any) -> None:
    module._modules.pop("processor", None)
    module.__dict__.pop("processor", None)
    module.processor = processor


# -- the forward of the denoiser ------------------------------------------------------------------
def _begin(state: _Open, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = list(inspect.signature(type(state.denoiser).forward).parameters)[1:]
    given = {**dict(zip(names, args)), **kwargs}
    flux = isinstance(state.denoiser, FluxTransformer2DModel)
    unet = isinstance(state.denoiser, UNet2DConditionModel)
    _end_watches(state)
    sample = given["sample" if unet else "hidden_states"]
    text = given.get("encoder_hidden_states")
    schedule = getattr(getattr(state.pipeline, "scheduler", None), "timesteps", None)
    if state.run < 0 or schedule is not state.schedule:
        # set_timesteps makes a new tensor: the pipeline begins anew
        state.schedule, state.sample = schedule, None
        state.run, state.step, state.prompts = state.run + 1, -1, None
    # Flux's true guidance runs the same latents again, without the prompt
    again = flux and state.pipeline is not None and sample is state.sample
    state.step += not again
    state.sample = sample if flux else None
    state.timestep = float(torch.as_tensor(given["timestep"]).flatten()[0])
    state.text = 0 if text is None else text.shape[1]
    state.size = _size(state.denoiser, sample, given)
    rows = _rows(state, sample, again)
    # moved once a forward: a look at values would make a GPU wait in every attention
    state.index = None if rows is None else rows.nonzero()[:, 0].to(sample.device)
    state.rows = None if rows is None else rows.to(sample.device)
    if not again and state.rows is not None and text is not None:
        state.prompts = _match(state, text[state.rows.to(text.device)])


def _size(denoiser: Any, sample: Tensor, given: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the latents, in image tokens for a transformer."""
    if isinstance(denoiser, UNet2DConditionModel):
        return tuple(sample.shape[-2:])  # type: ignore[return-value]
    if isinstance(denoiser, SD3Transformer2DModel):
        patch = denoiser.config.patch_size  # type: ignore[attr-defined]
        return sample.shape[-2] // patch, sample.shape[-1] // patch
    ids = given["img_ids"]
    ids = ids[0] if ids.dim() == 3 else ids
    height, width = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    return (height, width) if height * width == len(ids) else None


def _rows(state: _Open, sample: Tensor, again: bool) -> Tensor | None:
    """Which rows the prompt drives; None where that cannot be told."""
    batch = sample.shape[0]
    every = torch.full((batch,), not again, dtype=torch.bool)
    if isinstance(state.denoiser, FluxTransformer2DModel):
        return every
    half = batch // 2
    if batch % 2 or not torch.equal(sample[:half], sample[half:]):
        return every
    try:
        guided = state.pipeline.do_classifier_free_guidance
    except AttributeError:  # no pipeline, or one that was not called
        return None
    if guided:
        every[:half] = False
    return every


def _match(state: _Open, text: Tensor) -> Prompts | None:
    """The prompts whose encoding reached the denoiser, the latest first."""
    for prompts in reversed(state.encoded):
        own = prompts.embeds
        if own.shape == text.shape and torch.equal(own.to(text), text):
            return prompts
    return state.prompts


def _listen(state: _Open, pipeline: Any) -> None:
    """Learn the prompts from the pipeline's own `encode_prompt`."""
    if not hasattr(pipeline, "encode_prompt") or "encode_prompt" in vars(pipeline):
        return
    plain = pipeline.encode_prompt
    signature = inspect.signature(plain)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        given = dict(signature.bind(*args, **kwargs).arguments)
        state.encoded.append(_prompts(pipeline, plain, given, out))
        del state.encoded[:-4]
        return out

    pipeline.encode_prompt = encode_prompt
    state.undo.append(lambda: vars(pipeline).pop("encode_prompt", None))


def _prompts(pipeline: Any, plain: Any, given: dict[str, Any], out: Any) -> Prompts:
    texts = given.get("prompt")
    if given.get("prompt_embeds") is not None:
        texts = None
    texts = [texts] if isinstance(texts, str) else texts
    readers = _tokenizers(pipeline, out[0].shape[1])
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    if texts is not None and convert is not None and readers:
        texts = [convert(text, readers[0][0]) for text in texts]

    def encode(new: list[str]) -> Tensor:
        changed: dict[str, Any] = {"prompt": list(new)}
        for name in ("prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds"):
            if name in given:
                changed[name] = None
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt"):
            if name in given:
                changed[name] = None
        if "do_classifier_free_guidance" in inspect.signature(plain).parameters:
            changed["do_classifier_free_guidance"] = False
        changed["num_images_per_prompt"] = 1
        embeds = plain(**{**given, **changed})[0]
        assert isinstance(embeds, Tensor)
        return embeds

    images = int(given.get("num_images_per_prompt") or 1)
    return Prompts(texts, out[0], images, encode, readers)


def _tokenizers(pipeline: Any, length: int) -> tuple[tuple[Any, int, int], ...]:
    """Tokenizer, first key column and number of columns of every text encoder."""
    third = getattr(pipeline, "tokenizer_3", None)
    own = getattr(pipeline, "tokenizer", None) or getattr(pipeline, "tokenizer_2", None)
    if isinstance(body(pipeline), FluxTransformer2DModel):
        # only T5 speaks through keys; CLIP gives one pooled vector
        return ((pipeline.tokenizer_2, 0, length),)
    if isinstance(body(pipeline), SD3Transformer2DModel) and own is not None:
        clip = pipeline.tokenizer_max_length
        first = ((own, 0, clip),)
        return (*first, (third, clip, length - clip)) if third is not None else first
    return () if own is None else ((own, 0, length),)


# -- the forward of one attention module ----------------------------------------------------------
class _Asked(Exception):
    """Carries keys and values out of a processor that was only asked for them."""


class _Watch(TorchFunctionMode):
    """Answers the scaled_dot_product_attention of one attention module."""

    def __init__(self, state: _Open, module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        super().__init__()
        self.state, self.module, self.args, self.kwargs = state, module, args, kwargs
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return _attention(self, *args, **(kwargs or {}))


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
            f"the processor {type(module.processor).__name__} of "
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
) -> Tensor:
    """The signature of `scaled_dot_product_attention`, answered through the handlers."""
    site = site_of(watch.module)
    if site is None:
        raise ReachError("an attention module ran that no open session knows: open it anew")
    if dropout_p:
        raise ReachError("attention dropout is on: set it to 0 for the look")
    mask, bias = (Mask.causal(), None) if is_causal else _mask(attn_mask, query, key)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    call = Call(
        site, query, key, value, mask, factor, bias=bias, denoising=_place(watch, site, query, key)
    )
    return run(watch.module, call).out.to(query.dtype)


def _mask(given: Tensor | None, q: Tensor, k: Tensor) -> tuple[Mask, Tensor | None]:
    from .transformers import _from_tensor

    if given is None:
        return Mask.full(), None
    while given.dim() < 4:
        given = given[None]
    given = given.expand(*given.shape[:2], q.shape[2], k.shape[2])
    if given.dtype != torch.bool and not bool(given.any()):
        return Mask.full(), None
    return _from_tensor(given)


def _place(watch: _Watch, site: Site, q: Tensor, k: Tensor) -> Denoising:
    state, queries, keys = watch.state, q.shape[2], k.shape[2]
    image, text = slice(0, queries), None
    project = None
    if site.kind == "cross":
        text = slice(0, keys)
        project = _projection(watch)
    elif site.kind == "joint":
        length = state.text
        if isinstance(state.denoiser, FluxTransformer2DModel):
            text, image = slice(0, length), slice(length, queries)
        else:
            image, text = slice(0, queries - length), slice(keys - length, keys)
    grid = _grid(state, image.stop - image.start, site)
    known = state.rows is not None and len(state.rows) == len(q)
    return Denoising(
        state.run,
        state.step,
        state.timestep,
        state.rows if known else None,
        state.index if known else None,
        grid,
        image,
        text,
        state.prompts,
        project,
    )


def _grid(state: _Open, tokens: int, site: Site) -> tuple[int, int] | None:
    """Height and width of so many image tokens; a UNet halves the latents, rounding up."""
    if state.size is None:
        return None
    height, width = state.size
    if isinstance(state.denoiser, UNet2DConditionModel):
        while height * width > tokens and height * width > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == tokens else None


def _projection(watch: _Watch) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Let the processor itself make keys and values of another context."""
    module = watch.module

    def project(context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = watch.args[0] if watch.args else watch.kwargs["hidden_states"]
        one = hidden[:1, :1].expand(len(context), 1, hidden.shape[-1])
        kwargs = {n: v for n, v in watch.kwargs.items() if n not in ("hidden_states",)}
        known = inspect.signature(module.processor.__call__).parameters
        kwargs = {n: v for n, v in kwargs.items() if n in known}
        kwargs |= {"encoder_hidden_states": context, "attention_mask": None}
        try:
            with _Keys():
                module.processor(module, one, **kwargs)
        except _Asked as asked:
            return asked.args
        raise ReachError(f"{type(module.processor).__name__} asked for no attention")

    return project
