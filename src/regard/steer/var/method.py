"""VAR: give the attention that a vision-language model spends on sink tokens to its image.

Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", Kang et al., 2025
(ICLR), arXiv 2503.03321.

Deviations:
- Every row of a batch has sinks of its own; the released code pools them over the batch.
- A query between two images recycles for the images before it; the paper has one image.
- Tokens of later turns that come in several at once add sinks; generated tokens never are sinks.
- The separators between the rows of patches of a tiled image (LLaVA-NeXT) count as text.
- How the dims of a new model are found (`find_sink_dims`) is ours: the paper looks at the first
  token by eye.
- `give`, `heads="all"` and `random_sinks` are the controls of the evaluation, not the method.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, State, mass
from regard.errors import InputError, ReachError, nearest
from regard.parts.decoding.picks import over, put, take_queries
from regard.parts.vision import Images, decoder, locate
from regard.reach import Call, Handler, Site

EPS = 1e-6
STEADY = 0.8  # share of layers and prompts in which a massive dim stands out
SHORT = (
    "another method changed which tokens this layer reads, and VAR knows the sinks by their place "
    "in the prompt: apply VAR without it"
)
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


@dataclass
class Found:
    """What VAR saw in one layer.

    Attributes:
        sinks: `[batch, tokens]`, the sink tokens, padding left out.
        image: `[batch, tokens]`, the image tokens.
        chosen: one tensor a call, `[batch, heads, queries]`: the rows whose attention was moved.
        moved: one tensor a call, `[batch, heads, queries]`: how much of it.
    """

    sinks: Tensor
    image: Tensor
    chosen: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class VAR(Handler):
    """Take the share `move` of the attention on sink tokens, and give it to the image tokens that
    are no sinks, in proportion, in the heads and queries that look at the image.

    A token is a sink of a layer when its hidden state x entering the layer has
    `max_d |x[d]| / rms(x) >= tau` over the few dims d of massive activation. A row of attention (a
    head and a text query) is image-centric when its image tokens hold at least `image_mass`, and
    those that are no sinks at least `nonsink_ratio` of that.

    Two names for the strength exist in the world. `VAR.paper(p=0.6, rho=0.8)` reads p as the share
    moved and rho as the least share of tokens that are no sinks; `VAR.released_code(p=0.6,
    rho=0.5)` reads p as the share kept and rho as the greatest share of sinks, acts in layers 2 to
    the last, and skips layers without visual sinks.

    Args:
        move: share of the attention on sinks that is moved, 0 to 1; 0 leaves the model as it is.
        nonsink_ratio: 0.8 for general questions, 0.5 against hallucination, 0.9 for vision-centric
            questions (the paper's three values).
        image_mass: least attention of a row on image tokens.
        tau: bar of the sinks; at most sqrt(hidden size) can be reached.
        dims: the dims of massive activation, or a name of `DIMS`; those of a known language model
            when None. `find_sink_dims` finds them for any other.
        layers: which layers act; all but the last when None.
        rule: "paper" or "released_code", see above.
        heads: "image-centric", or "all" (control: every text row that sees the image).
        give: "image", or "text" or "both" (controls: who receives).
        random_sinks: a seed; as many random image tokens stand in for the visual sinks (control).

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model = tiny_vlm("llava")
    >>> with torch.no_grad(), regard.apply(model, VAR(tau=4.0, dims=[5, 9])):
    ...     model(**vlm_inputs("llava", model)).logits.shape
    torch.Size([2, 26, 128])

    Raises:
        InputError: a setting out of range, a model without image tokens or whose dims are not
            known, a cache whose prompt was read without VAR.
        ReachError: a method before it shows other keys to other heads.
    """

    move: float = 0.6
    nonsink_ratio: float = 0.8
    image_mass: float = 0.2
    tau: float = 20.0
    dims: Sequence[int] | str | None = None
    layers: Sequence[int] | None = None
    rule: str = "paper"
    heads: str = "image-centric"
    give: str = "image"
    random_sinks: int | None = None
    _sites: dict[str, Site] = field(default_factory=dict, init=False, repr=False)
    _acting: list[int] = field(default_factory=list, init=False, repr=False)
    _images: Images | None = field(default=None, init=False, repr=False)
    _patch: Tensor | None = field(default=None, init=False, repr=False)
    _text: Tensor | None = field(default=None, init=False, repr=False)
    _state: Tensor | None = field(default=None, init=False, repr=False)
    _start: int = field(default=0, init=False, repr=False)
    _found: dict[int, Found] = field(default_factory=dict, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)
    _dims: tuple[int, ...] = field(default=(), init=False, repr=False)

    @classmethod
    def paper(cls, p: float = 0.6, rho: float = 0.8, **settings: Any) -> VAR:
        """p is the share moved, rho the least share of image attention on tokens that are no
        sinks.
        """
        return cls(move=p, nonsink_ratio=rho, rule="paper", **settings)

    @classmethod
    def released_code(cls, p: float = 0.6, rho: float = 0.5, **settings: Any) -> VAR:
        """p is the share kept, rho the greatest share of image attention on sinks."""
        return cls(move=1 - p, nonsink_ratio=1 - rho, rule="released_code", **settings)

    def __post_init__(self) -> None:
        if not 0 <= self.move <= 1:
            raise InputError(f"move is the share moved off the sinks, 0 to 1, not {self.move}")
        if not 0 <= self.nonsink_ratio <= 1 or not 0 <= self.image_mass <= 1:
            raise InputError("nonsink_ratio and image_mass are shares, from 0 to 1")
        if self.tau <= 0:
            raise InputError(f"tau is positive, not {self.tau}")
        for name, value, known in (
            ("rule", self.rule, ("paper", "released_code")),
            ("heads", self.heads, ("image-centric", "all")),
            ("give", self.give, ("image", "text", "both")),
        ):
            if value not in known:
                raise InputError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if isinstance(self.dims, str) and self.dims not in DIMS:
            raise InputError(f"no dims are known by {self.dims!r}.{nearest(self.dims, DIMS)}")

    def sites(self, sites: list[Site]) -> list[Site]:
        self._found.clear()
        self._state = self._patch = None
        self._sites = {s.name: s for s in sites if s.kind == "self"}
        return list(self._sites.values())

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        body = decoder(model, "VAR")
        self._dims = _dims(self.dims, body.config)
        size = int(body.config.hidden_size)
        wrong = [d for d in self._dims if not 0 <= d < size]
        if wrong:
            raise InputError(f"there is no dim {wrong[0]}: hidden states have {size}, from 0")
        if self.tau >= size**0.5:
            raise InputError(
                f"tau={self.tau:g} can never be reached: with {size} dims the bound is "
                f"{size**0.5:.1f}; take tau={size**0.5 / 2:.1f} or less"
            )
        names = {id(m): n for n, m in model.named_modules()}
        undo = [model.register_forward_pre_hook(self._enter, with_kwargs=True).remove]
        by_index: dict[int, Site] = {}
        for n, layer in enumerate(body.layers):
            prefix = names[id(layer)] + "."
            site = next((s for s in self._sites.values() if s.name.startswith(prefix)), None)
            if site is None:
                continue
            by_index[n] = site
            hook = layer.register_forward_pre_hook(self._look(site), with_kwargs=True)
            undo.append(hook.remove)
        last = len(body.layers) - 1
        acting = self.layers
        if acting is None:
            acting = range(2, last + 1) if self.rule == "released_code" else range(last)
        out = [n for n in acting if n not in by_index]
        if out:
            for remove in undo:
                remove()
            raise InputError(f"layer {out[0]} is out of range: this model has layers 0 to {last}")
        self._acting = [by_index[n].index for n in acting]
        return undo

    @property
    def dims_used(self) -> tuple[int, ...]:
        """The dims of massive activation in use, once applied to a model."""
        return self._dims

    def found(self) -> dict[int, Found]:
        """What was seen, by layer, since the last prompt began."""
        layers = {s.index: s.layer for s in self._sites.values()}
        return {layers[index]: found for index, found in sorted(self._found.items())}

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: where are the images?"""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        images = locate(module, {**kwargs, "input_ids": ids})
        patch, text = images.patch >= 0, (images.patch < 0) & images.live
        if start == 0:
            self._found.clear()
            if not images.count and not self._warned:
                self._warned = True
                warnings.warn(
                    "VAR: there is no image in the prompt, so nothing changes", stacklevel=2
                )
        elif self._patch is None or len(self._patch) != len(patch) or self._patch.shape[1] < start:
            raise InputError(
                "the prompt in this cache was read without VAR, so its sinks are not known: apply "
                "VAR before the prompt is read"
            )
        else:
            patch = torch.cat([self._patch[:, :start], patch], 1)
        self._images, self._patch, self._text, self._start = images, patch, text, start

    def _look(self, site: Site) -> Callable[..., None]:
        """The hook that sees the hidden states entering the layer of this site."""

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if site.index not in self._acting or self._images is None or self._patch is None:
                return
            x = args[0] if args else kwargs["hidden_states"]
            live, new = self._images.live, x.shape[1]
            if live.shape[1] != new:
                raise ReachError(SHORT)
            if self._start and new == 1:  # generated tokens are never sinks
                sinks = torch.zeros_like(live)
            else:
                phi = relative(x, self._dims)
                sinks = (phi > self.tau if self.rule == "released_code" else phi >= self.tau) & live
                if self.random_sinks is not None:
                    sinks = self._shuffled(sinks, site.index)
            old = self._found.get(site.index)
            if old is None:
                self._found[site.index] = Found(sinks, self._patch)
            else:
                old.sinks = torch.cat([old.sinks[:, : self._start], sinks], 1)
                old.image = self._patch

        return look

    def _shuffled(self, sinks: Tensor, index: int) -> Tensor:
        """As many random image tokens in place of the visual sinks of every row."""
        assert self._patch is not None and self.random_sinks is not None
        image = self._patch[:, self._start :]
        drawn = sinks & ~image
        for b in range(len(sinks)):
            make = torch.Generator().manual_seed(self.random_sinks * 10007 + index)
            places = image[b].nonzero()[:, 0].cpu()
            count = int((sinks[b] & image[b]).sum())
            drawn[b, places[torch.randperm(len(places), generator=make)[:count]]] = True
        return drawn

    def _check(self, call: Call) -> None:
        """Refuse calls whose tokens are not those of the prompt, in order."""
        if call.positions is not None:
            raise ReachError(
                f"the heads of {call.site.name} look at different keys under another method, which "
                "VAR cannot follow: apply VAR without it"
            )
        assert self._text is not None
        if call.query_offset != self._start or call.q.shape[2] != self._text.shape[1]:
            raise ReachError(SHORT)

    def after(self, call: Call, state: State) -> State | None:
        if call.site.index not in self._acting or self._text is None:
            return None
        self._check(call)
        found, text = self._found[call.site.index], self._text
        keys = slice(call.key_offset, call.key_offset + call.k.shape[2])
        image, sinks = found.image[:, keys], found.sinks[:, keys]
        idle = self.rule == "released_code" and not bool((image & sinks).any())
        if self.move == 0 or idle or not bool(image.any()) or not bool(text.any()):
            return None
        # a row of the batch without visual sinks is skipped alone, whatever the others have
        rows = text
        if self.rule == "released_code":
            rows = text & (image & sinks).any(-1)[:, None]
        few, places, ok = take_queries(call, rows)
        part = at_queries(state, places)
        edited, chosen, moved = redistribute(few, part, image, sinks, self)
        chosen, moved = chosen & ok[:, None], moved * ok[:, None]
        blank = state.lse.new_zeros(state.lse.shape)
        found.chosen.append(put(blank, chosen, places, ok) > 0)
        found.moved.append(put(blank, moved, places, ok))
        return State(put(state.out, edited.out, places, ok), state.lse)


@dataclass(eq=False)
class Redistribution(VAR):
    """VAR that also keeps, for every acting layer, what the last token of the prompt gives each
    token: `plain[layer]` before the edit and `given[layer]` after it, `[batch, heads, keys]`.

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model, method = tiny_vlm("llava"), Redistribution(tau=2.0, dims=[5, 9])
    >>> with torch.no_grad(), regard.apply(model, method):
    ...     out = model(**vlm_inputs("llava", model))
    >>> method.plain[0].shape, bool(torch.allclose(method.given[0].sum(-1), torch.ones(2, 4)))
    (torch.Size([2, 4, 26]), True)
    """

    plain: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    given: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def after(self, call: Call, state: State) -> State | None:
        edited = super().after(call, state)
        if self._start or call.site.index not in self._acting or self._text is None:
            return edited
        found, keys = self._found[call.site.index], call.k.shape[2]
        last = torch.zeros_like(self._text)
        last[:, -1] = True
        few, places, _ = take_queries(call, last)
        # with one-hot values the output of attention is the attention itself
        one_hot = torch.eye(keys, dtype=call.v.dtype, device=call.v.device)
        few = few.change(v=one_hot.expand(*call.k.shape[:2], keys, keys))
        out = over(few, torch.ones_like(found.image)).out
        part = State(out, at_queries(state, places).lse)
        layer = call.site.layer
        self.plain[layer] = self.given[layer] = part.out[:, :, -1]
        if edited is not None:
            moved, _, _ = redistribute(few, part, found.image, found.sinks, self)
            chosen = found.chosen[-1][:, :, -1:]
            self.given[layer] = torch.where(chosen, moved.out[:, :, -1], self.plain[layer])
        return edited


class SinkKnockout(VAR):
    """The probe of the evaluation: text may not look at the visual sinks any more.

    Takes the settings of VAR that find sinks (tau, dims, layers, rule, random_sinks); with
    `random_sinks` as many random image tokens are hidden instead. Every query keeps at least
    itself, so no row is left empty.
    """

    def before(self, call: Call) -> Call | None:
        if call.site.index not in self._acting or self._text is None:
            return None
        self._check(call)
        found, text = self._found[call.site.index], self._text
        keys = slice(call.key_offset, call.key_offset + call.k.shape[2])
        hidden, shift = (found.image & found.sinks)[:, keys], call.k.shape[2] - call.q.shape[2]
        if not bool(hidden.any()):
            return None

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ~(text[b, i - shift] & hidden[b, j])

        return call.change(mask=call.mask & Mask.predicate(seen, len(call.q)))

    def after(self, call: Call, state: State) -> State | None:
        return None


def redistribute(
    call: Call, state: State, image: Tensor, sinks: Tensor, settings: VAR
) -> tuple[State, Tensor, Tensor]:
    """The edit, exact, by the algebra of three partial States; the matrix is never formed.

    With the key groups VS (image sinks), TS (other sinks) and VN (image, no sinks), their masses w
    and outputs o, a selected row becomes `o - p (w_VS o_VS + w_TS o_TS) + p (w_VS + w_TS) o_VN`.

    Args:
        call: some queries; state: its State before the edit.
        image, sinks: `[batch, keys]`.

    Returns the State, which rows were selected and how much each moved, `[batch, heads, queries]`.
    """
    vs, ts, vn = (over(call, g) for g in (image & sinks, sinks & ~image, image & ~sinks))
    w_vs, w_ts, w_vn = (mass(s, state) for s in (vs, ts, vn))
    on_image = w_vs + w_vn
    if settings.rule == "released_code":
        # its ratio has 1e-6 added for every image token
        share = w_vs / (on_image + EPS * image.sum(-1)[:, None, None])
        enough = share <= 1 - settings.nonsink_ratio
    else:
        enough = w_vn >= settings.nonsink_ratio * on_image
    if settings.heads == "all":
        chosen = on_image > 0
    else:
        chosen = (on_image >= settings.image_mass) & enough
    taker, w_taker = vn, w_vn
    if settings.give != "image":
        keys = ~sinks & ~image if settings.give == "text" else ~sinks
        taker = over(call, keys)
        w_taker = mass(taker, state)
    chosen = chosen & (w_vn > 0) & (w_taker > 0)
    moved = settings.move * (w_vs + w_ts) * chosen
    out = state.out.to(moved.dtype)
    change = moved[..., None] * taker.out.to(moved.dtype)
    for part, w in ((vs, w_vs), (ts, w_ts)):
        change = change - (settings.move * w)[..., None] * part.out.to(moved.dtype)
    out = torch.where(chosen[..., None], out + change, out)
    return State(out.to(state.out.dtype), state.lse), chosen, moved


def relative(x: Tensor, dims: Sequence[int]) -> Tensor:
    """phi, the greatest |x[d]| / rms(x) over the dims, `[batch, tokens]`, at most sqrt(size).

    >>> relative(torch.tensor([[[0.0, 3.0, 4.0, 0.0]]]), [1])
    tensor([[1.2000]])
    """
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rms = (x.square().mean(-1) + EPS).sqrt()
    return x[..., list(dims)].abs().amax(-1) / rms


def at_queries(state: State, places: Tensor) -> State:
    """A State at the queries `places`, `[batch, picked]`.

    >>> one = State(torch.arange(6.0).view(1, 1, 3, 2), torch.zeros(1, 1, 3))
    >>> at_queries(one, torch.tensor([[2, 0]])).out
    tensor([[[[4., 5.],
              [0., 1.]]]])
    """
    index = places[:, None].expand(-1, state.lse.shape[1], -1)
    wide = index[..., None].expand(-1, -1, -1, state.out.shape[-1])
    return State(state.out.gather(2, wide), state.lse.gather(2, index))


def find_sink_dims(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    z: float = 5.0,
    most: int = 3,
    layers: Sequence[int] | None = None,
) -> list[int]:
    """The dims of massive activation of a model: those in which the first token stands out.

    In the middle half of the layers (or `layers`) the hidden state x of the first token of every
    prompt gives |x| / rms(x). The dims whose mean exceeds `z`, at most `most` of them, greatest
    first, are returned; each must stand out in four of five of these layers and prompts (SmolLM2's
    massive dim is gone for two layers in the middle).

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
            "this model shows no massive activation, and VAR has no sinks to find in it"
        )
    unsure = [d for d in top if float((each[:, d] > z).float().mean()) < STEADY]
    if unsure:
        raise InputError(
            f"dim {unsure[0]} stands out in some layers or prompts only: name fewer layers, or "
            "give dims by hand"
        )
    return top


def _dims(given: Sequence[int] | str | None, config: Any) -> tuple[int, ...]:
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
            "the dims of massive activation of this language model are not known: let `regard run "
            "var --dims auto` or regard.steer.find_sink_dims(model, prompts) find them, and "
            "pass dims="
        )
    return DIMS[known]
