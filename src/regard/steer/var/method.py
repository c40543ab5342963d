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

from regard.core import State
from regard.errors import InputError, ReachError, nearest
from regard.parts.decoding.picks import over, put, take_queries
from regard.parts.vision import Encoded, Images, decoder, layer_sites, locate
from regard.reach import Call, Handler, Site

from .card import PRESETS, Settings
from .dims import DIMS, dims_of_model, find_sink_dims, relative
from .edit import LayerSinks, at_queries, redistribute

SHORT = (
    "another method changed which tokens this layer reads, and VAR knows the sinks by their place "
    "in the prompt: apply VAR without it"
)


@dataclass(eq=False)
class VAR(Settings, Handler):
    """Take the share `move` of the attention on sink tokens, and give it to the image tokens that
    are no sinks, in proportion, in the heads and queries that look at the image.

    A token is a sink of a layer when its hidden state x entering the layer has
    `max_d |x[d]| / rms(x) >= tau` over the few dims d of massive activation. A row of attention (a
    head and a text query) is image-centric when its image tokens hold at least `image_mass`, and
    those that are no sinks at least `nonsink_ratio` of that.

    Paper and released code name p and rho differently: `VAR.paper(p=0.6, rho=0.8)` reads p as the
    share moved and rho as the least share of tokens that are no sinks; `VAR.released(p=0.6,
    rho=0.5)` reads p as the share kept and rho as the greatest share of sinks.

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

    record_last: bool = field(default=False, init=False, repr=False)
    """Whether `last_before` and `last_after` are kept: by layer, what the last token of the prompt
    gives each token before and after the edit, `[batch, heads, keys]`."""
    last_before: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    last_after: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _sites: list[Site] = field(default_factory=list, init=False, repr=False)
    _acting: list[int] = field(default_factory=list, init=False, repr=False)
    _encoded: Encoded = field(init=False, repr=False)
    _prompt: Images | None = field(default=None, init=False, repr=False)
    _images: Images | None = field(default=None, init=False, repr=False)
    _patch: Tensor | None = field(default=None, init=False, repr=False)
    _text: Tensor | None = field(default=None, init=False, repr=False)
    _start: int = field(default=0, init=False, repr=False)
    _found: dict[int, LayerSinks] = field(default_factory=dict, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)
    _dims: tuple[int, ...] = field(default=(), init=False, repr=False)

    @classmethod
    def paper(cls, p: float = 0.6, rho: float = 0.8, **settings: Any) -> VAR:
        """p is the share moved, rho the least share of image attention that is on no sinks."""
        return cls(move=p, nonsink_ratio=rho, variant="paper", **settings)

    @classmethod
    def released(cls, p: float = 0.6, rho: float = 0.5, **settings: Any) -> VAR:
        """p is the share kept, rho the greatest share of image attention on sinks."""
        return cls(move=1 - p, nonsink_ratio=1 - rho, variant="released", **settings)

    released_code = released  # its older name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None:
            self.variant, self.rule = self.rule.removesuffix("_code"), None
        if self.nonsink_ratio is None:
            self.nonsink_ratio = PRESETS[self.preset]
        if isinstance(self.dims, str) and self.dims not in ("auto", *DIMS):
            raise InputError(f"no dims are known by {self.dims!r}.{nearest(self.dims, DIMS)}")

    def prepare(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Find the dims on this prompt if they are "auto", and record what its last token gives."""
        if self.dims == "auto":
            self.dims = find_sink_dims(model, [inputs])
        self.record_last = True

    def sites(self, sites: list[Site]) -> list[Site]:
        self._found.clear()
        self._prompt = self._patch = None
        self._sites = [s for s in sites if s.kind == "self"]
        return self._sites

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        body = decoder(model, "VAR")
        self._dims = dims_of_model(self.dims, body.config)
        size, last = int(body.config.hidden_size), len(body.layers) - 1
        wrong = [d for d in self._dims if not 0 <= d < size]
        if wrong:
            raise InputError(f"there is no dim {wrong[0]}: hidden states have {size}, from 0")
        if self.tau >= size**0.5:
            raise InputError(
                f"tau={self.tau:g} can never be reached: with {size} dims the bound is "
                f"{size**0.5:.1f}; take tau={size**0.5 / 2:.1f} or less"
            )
        sites = layer_sites(model, body, self._sites)
        acting = self.layers
        if acting is None:
            acting = range(2, last + 1) if self.variant == "released" else range(last)
        out = [n for n in acting if n not in sites]
        if out:
            raise InputError(f"layer {out[0]} is out of range: this model has layers 0 to {last}")
        self._acting = [sites[n].index for n in acting]
        self._encoded = Encoded(model)
        hooks = [self._encoded, model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for n in acting:
            look = self._look(sites[n])
            hooks.append(body.layers[n].register_forward_pre_hook(look, with_kwargs=True))
        return [hook.remove for hook in hooks]

    @property
    def dims_used(self) -> tuple[int, ...]:
        """The dims of massive activation in use, once applied to a model."""
        return self._dims

    def found(self) -> dict[int, LayerSinks]:
        """What was seen, by layer, since the last prompt began."""
        layers = {s.index: s.layer for s in self._sites}
        return {layers[index]: seen for index, seen in sorted(self._found.items())}

    def report(self) -> dict[str, Any]:
        """Plain data of the last prompt (row 0): sinks and moved attention of every layer; what its
        last token gives each patch of the pictures, where that was recorded.
        """
        if self._prompt is None:
            return {"dims": list(self._dims), "layers": []}
        number, patch = (x[0].cpu() for x in (self._prompt.number, self._prompt.patch))
        layers = []
        for layer, seen in self.found().items():
            sinks, chosen = seen.sinks[0, : len(patch)].cpu(), [c[0] for c in seen.chosen]
            moved = [float(x) for m, c in zip(seen.moved, chosen) for x in m[0][c].flatten()]
            on_image = (sinks & (patch >= 0)).nonzero()[:, 0].tolist()
            on_text = (sinks & (patch < 0)).nonzero()[:, 0].tolist()
            layers.append(
                {
                    "layer": layer,
                    "text_sinks": [{"position": n} for n in on_text],
                    "image_sinks": [
                        {"image": int(number[n]), "patch": int(patch[n])} for n in on_image
                    ],
                    "rows": sum(c.numel() for c in chosen),
                    "rows_changed": sum(int(c.sum()) for c in chosen),
                    "moved": sum(moved) / max(1, len(moved)),
                }
            )
        report: dict[str, Any] = {"dims": list(self._dims), "layers": layers}
        at = self._prompt.cells(0).cpu()
        if self.last_before and len(at):
            report["grid"] = self._prompt.grids[0][0]
            report["attention"] = {
                name: torch.stack([a[0].mean(0) for a in each.values()]).mean(0).cpu()[at].tolist()
                for name, each in (("before", self.last_before), ("after", self.last_after))
            }
        return report

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: where are the images?"""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        images = locate(module, self._encoded.complete({**kwargs, "input_ids": ids}))
        patch, text = images.patch >= 0, (images.patch < 0) & images.live
        if start == 0:
            self._found.clear()
            self._prompt = images
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
            if self._images is None or self._patch is None:
                return
            x = args[0] if args else kwargs["hidden_states"]
            live, new = self._images.live, x.shape[1]
            if live.shape[1] != new:
                raise ReachError(SHORT)
            if self._start and new == 1:  # generated tokens are never sinks
                sinks = torch.zeros_like(live)
            else:
                phi = relative(x, self._dims)
                sinks = (phi > self.tau if self.variant == "released" else phi >= self.tau) & live
                if self.random_sinks is not None:
                    sinks = self._shuffled(sinks, site.index)
            seen = self._found.get(site.index)
            if seen is None:
                self._found[site.index] = LayerSinks(sinks, self._patch)
            else:
                seen.sinks = torch.cat([seen.sinks[:, : self._start], sinks], 1)
                seen.image = self._patch

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

    def seen(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Image and sink tokens among the keys of a call, `[batch, keys]`; None where VAR is idle.

        Raises:
            ReachError: the call's tokens are not those of the prompt, in order.
        """
        if call.site.index not in self._acting or self._text is None:
            return None
        if call.positions is not None:
            raise ReachError(
                f"the heads of {call.site.name} look at different keys under another method, which "
                "VAR cannot follow: apply VAR without it"
            )
        if call.query_offset != self._start or call.q.shape[2] != self._text.shape[1]:
            raise ReachError(SHORT)
        layer = self._found[call.site.index]
        keys = slice(call.key_offset, call.key_offset + call.k.shape[2])
        return layer.image[:, keys], layer.sinks[:, keys]

    def after(self, call: Call, state: State) -> State | None:
        seen = self.seen(call)
        if seen is None or self._text is None:
            return None
        edited = self._edit(call, state, *seen)
        if self.record_last and not self._start:
            self._record(call, state, *seen, changed=edited is not None)
        return edited

    def _edit(self, call: Call, state: State, image: Tensor, sinks: Tensor) -> State | None:
        rows, layer = self._text, self._found[call.site.index]
        assert rows is not None
        if self.variant == "released":  # rows of the batch without visual sinks are left alone
            rows = rows & (image & sinks).any(-1)[:, None]
        if self.move == 0 or not bool(image.any()) or not bool(rows.any()):
            return None
        few, places, ok = take_queries(call, rows)
        edited, chosen, moved = redistribute(few, at_queries(state, places), image, sinks, self)
        blank = state.lse.new_zeros(state.lse.shape)
        layer.chosen.append(put(blank, chosen & ok[:, None], places, ok) > 0)
        layer.moved.append(put(blank, moved * ok[:, None], places, ok))
        return State(put(state.out, edited.out, places, ok), state.lse)

    def _record(
        self, call: Call, state: State, image: Tensor, sinks: Tensor, changed: bool
    ) -> None:
        """Keep what the last token of the prompt gives each token, before and after the edit."""
        assert self._text is not None
        layer, keys = call.site.layer, call.k.shape[2]
        last = torch.zeros_like(self._text)
        last[:, -1] = True
        few, places, _ = take_queries(call, last)
        # with one-hot values the output of attention is the attention itself
        one_hot = torch.eye(keys, dtype=call.v.dtype, device=call.v.device)
        few = few.change(v=one_hot.expand(*call.k.shape[:2], keys, keys))
        part = State(over(few, torch.ones_like(image)).out, at_queries(state, places).lse)
        self.last_before[layer] = self.last_after[layer] = part.out[:, :, -1]
        if changed:
            edited, _, _ = redistribute(few, part, image, sinks, self)
            chosen = self._found[call.site.index].chosen[-1][:, :, -1:]
            self.last_after[layer] = torch.where(chosen, edited.out[:, :, -1], part.out[:, :, -1])
