"""Which place an attention call has in a forward pass: whose turn it is where layers share a
module, and which part of a sequence it is where one module is called for every image or window.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from regard.errors import ReachError

from .call import Call, Site


@dataclass
class _Seen:
    """A call of this forward pass."""

    key: Any
    query: Callable[[], Any]
    keys: int


class Turns:
    """Counts the attention calls of a model from the beginning of every forward pass.

    A module that is called several times in a pass is

    - several layers, where the model says so (ALBERT), or where a stack with a cache runs through
      it again (HRM): each run is a site of its own, the layers counted on;
    - one layer on several parts of a sequence (one call an image, a window, a packed document)
      anywhere else: `Call.chunk` counts them.
    """

    def __init__(self, module: Any, sites: list[Site]) -> None:
        self._module, self._sites = module, sites
        self_sites = [s for s in sites if s.kind == "self"] or sites
        self._main = self_sites[-1].part
        self._span = {
            part: max(s.layer for s in sites if s.part == part) + 1
            for part in {s.part for s in sites}
        }
        self.further: dict[tuple[int, int], Site] = {}  # of a site, its later turns
        self.past: int | None = None  # tokens in the cache as the pass began; None outside one
        self._mask: Any = None  # attention_mask of this pass, as it was given
        names = list(inspect.signature(module.forward).parameters)
        self._place = names.index("attention_mask") if "attention_mask" in names else None
        self._seen: dict[int, list[_Seen]] = {}
        self._entries: Counter[int] = Counter()

    def attach(self) -> list[Any]:
        """Hang the hooks; returns their handles."""
        modules = dict(self._module.named_modules(remove_duplicate=False))
        top = self._module
        handles = [
            top.register_forward_pre_hook(self._begin, with_kwargs=True),
            top.register_forward_hook(self._end, always_call=True),
        ]
        # a part that runs by itself, as encoders do under `generate`, begins a pass of its own
        parents = {s.part.removesuffix(" cross").rpartition(".")[0] for s in self._sites} - {""}
        handles += [
            modules[p].register_forward_pre_hook(self._part(p)) for p in parents if p in modules
        ]
        first: dict[int, Site] = {}
        for site in self._sites:
            if site.part == self._main or hasattr(modules[site.name], "layer_idx"):
                first.setdefault(id(modules[site.name]), site)
        for site in first.values():
            handles.append(modules[site.name].register_forward_pre_hook(self._enter(site)))
        return handles

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise ReachError(
                "the model is being exported or traced, and facts of symbols cannot be measured: "
                "export it outside of the session"
            )
        cache = kwargs.get("past_key_values")
        length = getattr(cache, "get_seq_length", None)
        self.past = int(length()) if length is not None else 0
        place = len(args) if self._place is None else self._place
        self._mask = args[place] if place < len(args) else kwargs.get("attention_mask")
        self._seen.clear()
        self._entries.clear()

    def _end(self, *_: Any) -> None:
        self.past = self._mask = None

    def padding(self, site: Site, batch: int, queries: int, keys: int) -> Tensor | None:
        """Which queries of a self-attention are tokens, by the mask that the model was given; None
        where all are, or where the mask is another sequence's.
        """
        mask = self._mask
        if (
            not isinstance(mask, Tensor)
            or site.part != self._main
            or getattr(self._module.config, "is_encoder_decoder", False)
            or mask.shape != (batch, keys)
        ):
            return None
        live = mask[:, keys - queries :] > 0
        return None if bool(live.all()) else live

    def _part(self, name: str) -> Callable[..., None]:
        indices = [s.index for s in self._sites if s.name.startswith(f"{name}.")]

        def begin(*_: Any) -> None:
            if self.past is None:
                for index in indices:
                    self._seen.pop(index, None)
                    self._entries.pop(index, None)

        return begin

    def _enter(self, site: Site) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._entries[site.index] += 1

        return enter

    def place(self, sites: list[Site], call: Call) -> Call:
        """The call with its site, its part of the sequence, and what the cache held."""
        first = sites[0]
        seen = self._seen.setdefault(first.index, [])
        # rows or heads that differ are no further part of the same sequence
        key = (self._entries[first.index], len(call.q), call.q.shape[1])
        if len(sites) > 1:
            key = (len(seen), *key[1:])
        keys = list(dict.fromkeys(s.key for s in seen))
        turn = keys.index(key) if key in keys else len(keys)
        before = [s for s in seen if s.key == key]
        repeats = bool(before) and before[-1].query() is call.q and first.part == self._main
        seen.append(_Seen(key, ref(call.q), call.k.data_ptr()))
        repeats = repeats and before[-1].keys == call.k.data_ptr()
        if len(sites) > 1:
            site = sites[turn % len(sites)]
        else:  # a layer that somebody runs by itself, outside of a pass, is that layer each time
            site = self._turn(first, 0 if self.past is None else turn)
        return call.change(site=site, chunk=len(before), repeats=repeats, past=self.past)

    def _turn(self, site: Site, turn: int) -> Site:
        if not turn:
            return site
        known = self.further.get((site.index, turn))
        if known is None:
            index = len(self._sites) + len(self.further)
            layer = site.layer + turn * self._span[site.part]
            known = self.further[site.index, turn] = replace(site, index=index, layer=layer)
        return known
