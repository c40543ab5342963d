"""Attention that a module computes by itself: read where its softmax or
`scaled_dot_product_attention` is.

Older models never ask transformers' `AttentionInterface`: they multiply queries and keys, add what
they add, take the softmax and multiply by the values. While such a module runs, a `Tape` follows
the product of queries and keys through whatever is added to it, up to the product with the
values; what is not queries times keys is a bias, so the call is exact whatever the model adds.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from regard.core import Mask
from regard.errors import ReachError

from . import dispatch
from .call import Call
from .handed import from_tensor
from .layout import Layout, einsum_operands, einsum_result
from .verify import agree

_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
_WHOLE = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_SOFTMAX = {"softmax", "_softmax", "log_softmax"}
_FACTORS = {"mul": 1, "__mul__": 1, "__rmul__": 1, "multiply": 1, "mul_": 1, "div": -1,
            "__truediv__": -1, "true_divide": -1, "div_": -1}  # fmt: skip
HIDDEN = -1e8  # scores below it are masked: the softmax gives 0 for them
MOST = 2  # differing calls of one pass through a module: more are blocks of one sparse map


@dataclass(frozen=True)
class _Scores:
    """Scores that hold `factor` times queries times keys, and more; None for joined parts."""

    q: Tensor | None
    k: Tensor | None
    factor: float = 1.0


@dataclass(frozen=True)
class _Shares:
    """The softmax of scores."""

    scores: Tensor
    of: _Scores


def attends(module: Any) -> bool:
    """Whether the code of a module computes softmax attention."""
    kind = type(module)
    if not any(word in kind.__name__.lower() for word in ("attention", "attn")):
        return False
    classes = [c for c in kind.__mro__ if c.__module__ == kind.__module__]
    classes += [type(m) for m in module.children() if type(m).__module__ == kind.__module__]
    functions = [f for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    codes = [code for f in functions for code in _codes(f)]
    scope = vars(sys.modules[kind.__module__])
    for name in {name for code in codes for name in code.co_names}:  # helpers of the same file
        helper = scope.get(name)
        if inspect.isfunction(helper) and helper.__module__ == kind.__module__:
            codes += _codes(helper)
    names = {name for code in codes for name in code.co_names}
    if names & _WHOLE:
        return True
    multiplies = bool(names & _PRODUCTS) or any(_has_at(code) for code in codes)
    return multiplies and "softmax" in {n.lower().lstrip("x") for n in names}


def _codes(function: Any) -> Iterator[CodeType]:
    left = [getattr(inspect.unwrap(function), "__code__", None)]
    while left:
        code = left.pop()
        if code is not None:
            yield code
            left += [c for c in code.co_consts if isinstance(c, CodeType)]


def _has_at(code: CodeType) -> bool:
    return any(
        i.opname == "BINARY_MATRIX_MULTIPLY" or (i.opname == "BINARY_OP" and i.argrepr == "@")
        for i in dis.get_instructions(code)
    )


def follow(module: Any) -> Callable[[], None]:
    """Read the attention of a module while it runs; returns what ends that."""
    running = _Running()

    def begin(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if dispatch.has_handler(module):  # another part may be watched beside what cannot be read
            given = next(_tensors((args, kwargs)), None)
            running.tapes.append(Tape(module, () if given is None else tuple(given.shape[:-1])))
            running.tapes[-1].__enter__()

    def end(*_: Any) -> None:
        if running.tapes:
            tape = running.tapes.pop()
            tape.__exit__(None, None, None)
            tape.close()

    first = module.register_forward_pre_hook(dispatch.Hook(begin), with_kwargs=True)
    last = module.register_forward_hook(dispatch.Hook(end), always_call=True)

    def leave() -> None:
        first.remove()
        last.remove()

    return leave


class _Running(threading.local):
    def __init__(self) -> None:
        self.tapes: list[Tape] = []


class Tape(TorchFunctionMode):
    """Follows scores through one forward pass of an attention module.

    Args:
        tokens: axes of what the module reads; queries that are none of them stand at no token.
    """

    def __init__(self, module: Any, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.tokens = module, tokens
        site = dispatch.site_of(module)
        assert site is not None
        self.site = site
        # what is followed, by the id of its tensor, which is kept so that no other gets the id
        self.scores: dict[int, tuple[Tensor, _Scores]] = {}
        self.shares: dict[int, tuple[Tensor, _Shares]] = {}
        self.waiting: set[int] = set()  # softmaxes that no values were multiplied with yet
        self.shapes: set[tuple[int, ...]] = set()
        self.unread = False  # a softmax of something else than such a product

    def close(self) -> None:
        """The module is done: every softmax of scores must have been understood."""
        if sys.exc_info()[0] is not None:
            return
        if self.waiting:
            self._refuse("uses its attention map otherwise than to weigh values")
        if self.unread and not self.shapes:
            self._refuse("takes no softmax of queries times keys, so it has no attention map")

    def _refuse(self, what: str) -> None:
        parts = [f'part="{part}"' for part in dispatch.other_parts(self.module)]
        where = f"watch another part of the model ({' or '.join(parts)})" if parts else ""
        raise ReachError(
            f"{self.site.name} ({type(self.module).__name__}) {what}, which regard cannot read: "
            f"{where or 'use a model class of transformers that asks the AttentionInterface'}"
        )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, args, kwargs)
        if name == "multi_head_attention_forward":
            return self._torch(func, args, kwargs)
        tensors = list(_tensors((args, kwargs)))
        shares = next((self.shares[id(t)] for t in tensors if id(t) in self.shares), None)
        if shares is not None and name in _PRODUCTS:
            return self._weigh(func, name, shares, args, kwargs)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        scores = next((self.scores[id(t)][1] for t in tensors if id(t) in self.scores), None)
        if name in _SOFTMAX:
            if scores is not None and tensors[0].shape == out.shape:
                self._softmax(out, tensors[0], scores, args, kwargs)
            elif out.dim() > 2:
                self.unread = True
        elif shares is not None:
            if out.numel() == shares[0].numel():
                self.shares[id(out)] = (out, shares[1])
        elif name in _PRODUCTS:
            self.scores[id(out)] = (out, _product(name, args, kwargs, out))
        elif scores is not None:
            kept = self._carried(name, scores, tensors, args, out)
            if kept is not None:
                self.scores[id(out)] = (out, kept)
        return out

    def _carried(
        self, name: str, scores: _Scores, tensors: list[Tensor], args: Any, out: Tensor
    ) -> _Scores | None:
        """What the result of an operation on scores holds of them."""
        if name in ("cat", "concat", "concatenate"):
            return _Scores(None, None)
        whole = next(t for t in tensors if id(t) in self.scores)
        if out.numel() != whole.numel():
            return None
        sign = _FACTORS.get(name)
        other = args[1] if sign and len(args) > 1 else None
        if isinstance(other, Tensor):
            other = other.item() if other.numel() == 1 and id(other) not in self.scores else None
        if isinstance(other, int | float) and args[0] is whole:
            return replace(scores, factor=scores.factor * float(other) ** (sign or 1))
        return scores

    def _softmax(
        self, out: Tensor, scores: Tensor, of: _Scores, args: Any, kwargs: dict[str, Any]
    ) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        if dim not in (-1, scores.dim() - 1):
            self._refuse("takes its softmax over another axis than the last")
        # scores may be written over; a softmax is taken of what they are now
        self.shares[id(out)] = (out, _Shares(scores.detach().clone(), of))
        self.waiting.add(id(self.shares[id(out)][1]))

    def _weigh(
        self,
        func: Any,
        name: str,
        shares: tuple[Tensor, _Shares],
        args: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """The product of an attention map and values: here the call is whole."""
        map_, known = shares
        given: Tensor | None
        plain = func(*args, **kwargs)
        if name == "einsum":
            given = einsum_operands(args, map_)
        else:
            operands = [t for t in _tensors((args, kwargs)) if t is not map_]
            given = operands[-1] if operands and _first(args) is map_ else None
        if given is None:
            self._refuse("multiplies its attention map by something else than values")
        layout = Layout.of(known.scores, self.module)
        if layout is None or given is None or given.shape[-2] != known.scores.shape[-1]:
            self._refuse("arranges its attention map in a way")
        assert given is not None and layout is not None
        v = layout.take(given.expand(*map_.shape[:-2], *given.shape[-2:]))
        call = self._call(known, layout, v)
        out = self._run(call, layout.take(plain) if name != "einsum" else None)
        self.waiting.discard(id(known))
        back = layout.give(out, map_.shape[:-2]).to(plain.dtype)
        return back if name != "einsum" else einsum_result(args, map_, back)

    def _run(self, call: Call, plain: Tensor | None) -> Tensor:
        self.shapes.add((*call.q.shape[:3], call.k.shape[2]))
        if len(self.shapes) > MOST:
            self._refuse("computes its attention in blocks of one sparse map")
        if plain is not None:
            agree(call, self.module, plain)
        return dispatch.run(self.module, call).out

    def _call(self, known: _Shares, layout: Layout, v: Tensor) -> Call:
        """Queries, keys and what else the scores hold."""
        scores = layout.take(
            known.scores.to(torch.promote_types(known.scores.dtype, torch.float32))
        )
        limit = max(HIDDEN, torch.finfo(known.scores.dtype).min / 2)
        allowed = scores > limit
        lost = ~allowed.any(-1, keepdim=True)  # the softmax of such a row is that of its scores
        allowed = allowed | (lost & (scores > -torch.inf))
        scores = torch.where(lost, scores - scores.amax(-1, keepdim=True), scores)
        queries, keys = scores.shape[-2:]
        q, k, factor = known.of.q, known.of.k, known.of.factor
        if q is not None and k is not None and q.shape[:-2].numel() == layout.rows:
            q, k = (layout.take(x.to(scores.dtype)) for x in (q, k))
            q = q.masked_fill(lost, 0)
            rest = scores - factor * (q @ k.transpose(-1, -2))
        else:  # parts that were joined: all of it is bias
            q, k = scores.new_zeros(*scores.shape[:3], 1), scores.new_zeros(*v.shape[:3], 1)
            rest, factor = scores, 1.0
        rest = rest.masked_fill(~allowed, 0)
        small = float(rest.abs().max()) <= 1e-5 * max(1.0, float((scores * allowed).abs().max()))
        mask = Mask.full() if bool(allowed.all()) else Mask.dense(_narrow(allowed))
        kind = self._kind(queries, keys)
        live = self._live(kind, len(q), queries, keys)
        if live is None and kind == "self" and queries == keys:
            # padding is seen by nobody, itself included
            kept = allowed.any(-2).any(1) & ~(lost[..., 0].all(1))
            live = None if bool(kept.all()) else dispatch.without_ended(kept, len(q), queries)
        bias = None if small else rest
        offset = keys - queries if kind == "self" else 0
        site = replace(self.site, kind=kind)
        dtype = v.dtype
        return Call(
            site, q.to(dtype), k.to(dtype), v, mask, factor, None, bias, None, live, offset, 0
        )

    def _kind(self, queries: int, keys: int) -> str:
        """Pooled keys, learned queries and memories stand at no token: they are looked across."""
        at_tokens = queries in self.tokens and keys >= queries
        if keys > queries and dispatch.past_of(self.module) == 0:
            at_tokens = False  # a memory that is no cache
        return self.site.kind if at_tokens else "cross"

    def _live(self, kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
        """Which queries count, by what the model was given and which rows have ended."""
        given = kind == "self"
        live = dispatch.padding_of(self.module, batch, queries, keys) if given else None
        return dispatch.without_ended(live, batch, queries)

    def _fused(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, args)), **kwargs}
        q, k, v = (given[n] for n in names[:3])
        if given.get("dropout_p"):
            raise ReachError(
                "attention dropout is on: call model.eval(), or set attention_dropout to 0"
            )
        lead, queries, keys = q.shape[:-2], q.shape[-2], k.shape[-2]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 else x for x in (q, k, v))
        q, k, v = (x[None] if x.dim() == 3 else x for x in (q, k, v))
        mask, bias = Mask.full(), None
        if given.get("is_causal"):
            mask = Mask.causal() if queries > 1 else Mask.full()
        elif given.get("attn_mask") is not None:
            tensor = given["attn_mask"]
            tensor = tensor.reshape(-1, *tensor.shape[-3:]) if tensor.dim() > 4 else tensor
            tensor = tensor.reshape(*(1,) * (4 - tensor.dim()), *tensor.shape)
            mask, bias = from_tensor(tensor.expand(-1, -1, queries, -1))
            if bias is not None:
                bias = bias.expand(*bias.shape[:2], queries, keys)
        scale = given.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        kind = self._kind(queries, keys)
        live = self._live(kind, len(q), queries, keys)
        offset = keys - queries if kind == "self" else 0
        call = Call(
            replace(self.site, kind=kind), q, k, v, mask, scale, None, bias, None, live, offset, 0
        )
        plain = func(*args, **kwargs)
        out = self._run(call, plain.reshape(*q.shape[:3], -1))
        return out.to(plain.dtype).reshape(*lead, queries, out.shape[-1])

    def _torch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """torch's own attention layer, projections and all."""
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        if a["bias_k"] is not None or a["add_zero_attn"]:
            self._refuse("adds keys of its own")
        _, shares = func(*args, **kwargs)
        if a["use_separate_proj_weight"]:
            weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
        else:
            weights = a["in_proj_weight"].chunk(3)
        biases = (None,) * 3 if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
        heads, batched = a["num_heads"], a["query"].dim() == 3
        q, k, v = (
            linear(x if batched else x[:, None], w, b)
            .unflatten(-1, (heads, -1))
            .permute(1, 2, 0, 3)
            for x, w, b in zip((a["query"], a["key"], a["value"]), weights, biases)
        )
        (batch, _, queries, dim), keys = q.shape, k.shape[2]
        mask, bias = Mask.full(), None
        if a["attn_mask"] is not None:
            x = a["attn_mask"]
            x = x.reshape(-1 if x.dim() == 3 else 1, heads if x.dim() == 3 else 1, queries, keys)
            mask, bias = from_tensor(~x if x.dtype == torch.bool else x)
        live = None
        if a["key_padding_mask"] is not None:
            x = a["key_padding_mask"].reshape(batch, keys)
            real = ~x if x.dtype == torch.bool else x > -torch.inf
            mask = mask & Mask.padding(real)
            live = real if queries == keys and not bool(real.all()) else None
        kind = self._kind(queries, keys)
        offset = keys - queries if kind == "self" else 0
        site = replace(self.site, kind=kind)
        call = Call(site, q, k, v, mask, dim**-0.5, None, bias, None, live, offset, 0)
        out = self._run(call, None).to(q.dtype).permute(2, 0, 1, 3).flatten(2)
        out = linear(out, a["out_proj_weight"], a["out_proj_bias"])
        return out if batched else out[:, 0], shares


def _product(name: str, args: Any, kwargs: dict[str, Any], out: Tensor) -> _Scores:
    """Queries and keys of a product whose last two axes are queries and keys."""
    from .layout import einsum_product

    if name == "einsum":
        return _Scores(*einsum_product(args, out))
    operands = list(_tensors((args, kwargs)))
    if name == "baddbmm":
        operands = operands[1:]
    if len(operands) != 2 or min(t.dim() for t in operands) < 3:
        return _Scores(None, None)
    a, b = operands
    lead = out.shape[:-2]
    factor = float(kwargs.get("alpha", 1.0)) if name == "baddbmm" else 1.0
    keys = b.transpose(-1, -2)
    return _Scores(a.expand(*lead, *a.shape[-2:]), keys.expand(*lead, *keys.shape[-2:]), factor)


def _narrow(allowed: Tensor) -> Tensor:
    """One head for all where they see alike."""
    first = allowed[:, :1]
    return first if bool((allowed == first).all()) else allowed


def _first(args: Any) -> Any:
    return args[0] if args else None


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for x in given:
            yield from _tensors(x)
    elif isinstance(given, dict):
        yield from _tensors(tuple(given.values()))
