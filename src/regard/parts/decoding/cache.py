"""What methods that store keys and values in their own way share: rows that grow, layers of a
cache that answer `generate`, putting them into a cache that is still empty, and what their settings
must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from regard.errors import InputError, ReachError
from regard.reach.call import Call, Site

GROWTH = 64  # a full store grows by 1/64 of its rows: held bytes stay within 2 % of the used


def check_whole(name: str, given: Any, least: int) -> None:
    """Refuse a setting that is no whole number of at least `least`."""
    if not isinstance(given, Integral) or isinstance(given, bool) or int(given) < least:
        raise InputError(f"{name} is a whole number of at least {least}, not {given!r}")


def check_number(name: str, given: Any) -> None:
    """Refuse a setting that is no finite number; its range is for the method to check."""
    if not isinstance(given, Real) or isinstance(given, bool) or not math.isfinite(given):
        raise InputError(f"{name} is a number, not {given!r}")


class Rows:
    """Rows `[batch, kv_heads, rows, dim]` that grow at the end without copying at every step.

    >>> import torch
    >>> rows = Rows(torch.zeros(1, 2, 3, 4))
    >>> rows.append(torch.ones(1, 2, 1, 4)).shape
    torch.Size([1, 2, 4, 4])
    """

    def __init__(self, start: Tensor) -> None:
        # a view would keep the storage behind it alive
        whole = start.untyped_storage().nbytes() == start.numel() * start.element_size()
        self._store = start if whole else start.contiguous().clone()
        self._count = start.shape[2]

    @property
    def data(self) -> Tensor:
        """The rows so far, a view."""
        return self._store[:, :, : self._count]

    @property
    def nbytes(self) -> int:
        """Bytes held, spare rows included."""
        return self._store.untyped_storage().nbytes()

    def __len__(self) -> int:
        return self._count

    def append(self, new: Tensor) -> Tensor:
        """Add rows `[batch, kv_heads, new, dim]`; returns all of them."""
        end = self._count + new.shape[2]
        if end > self._store.shape[2]:
            batch, heads, _, dim = self._store.shape
            grown = self._store.new_empty(batch, heads, end + max(end // GROWTH, 16), dim)
            grown[:, :, : self._count] = self.data
            self._store = grown
        self._store[:, :, self._count : end] = new
        self._count = end
        return self.data

    def pick(self, index: Tensor) -> Tensor:
        """A copy of the rows `[batch, kv_heads, picked]` of every head, in this order."""
        batch, heads, room, dim = self._store.shape
        if not self._store.is_contiguous():
            return self.data.gather(2, index[..., None].expand(*index.shape, dim))
        # whole rows at a time: several times faster than element by element
        first = torch.arange(0, batch * heads * room, room, device=index.device)
        flat = (index + first.view(batch, heads, 1)).flatten()
        return self._store.view(-1, dim).index_select(0, flat).view(*index.shape, dim)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order (beam search)."""
        self._store = self._store.index_select(0, rows.to(self._store.device))

    def crop(self, count: int) -> None:
        """Forget the last `count` rows."""
        self._count -= count


class MethodLayer(CacheLayerMixin):
    """A layer of a transformers cache whose rows belong to a method.

    `get_seq_length` counts every token seen, kept or not, so that positions go on as usual. Only
    the method knows how to attend to what it kept: used outside its session the layer refuses,
    instead of giving wrong answers. A subclass defines `store`, which takes in new keys and values
    and returns those that the attention call shall show, and `stores`.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.length = 0  # tokens seen
        self.row_shape = (0, 0, 0)  # heads and sizes of the keys and values last given
        self.open = False

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new rows `[batch, kv_heads, new, dim]`; what the call shall show as k and v."""
        raise NotImplementedError

    def stores(self) -> list[Rows]:
        """Everything held, for counting bytes and for beam search."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, counted from storage."""
        return sum(rows.nbytes for rows in self.stores())

    def check_call(self, call: Call) -> None:
        """Refuse a call that looks at something else than the keys and values that it caches.

        Raises:
            ReachError: multi-head latent attention, whose heads share one latent.
        """
        rows = (call.k.shape[1], call.k.shape[-1], call.v.shape[-1])
        if self.length and self.row_shape != rows:
            raise ReachError(
                f"{call.site.name} caches latents that all heads share (multi-head latent "
                f"attention), so {self.method} cannot keep other tokens for other heads and would "
                "hold more bytes than the plain cache: apply it to a model that caches keys and "
                "values"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.open:
            raise ReachError(
                f"this cache was filled under {self.method}, which alone knows how to read it: go "
                f"on inside regard.apply(model, {self.method}(...)), or begin with a new cache"
            )
        self.open = False
        self.row_shape = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[2]
        return self.store(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for rows in self.stores():
            rows.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise ReachError(
            f"{self.method} cannot take tokens back, which assisted decoding needs: generate "
            "without an assistant"
        )

    def offload(self) -> None:
        raise ReachError(f"{self.method} keeps its rows on the device: use a cache that stays")


def layers(
    cache: Any, sites: list[Site], method: str, make: Callable[[Site], MethodLayer]
) -> dict[int, MethodLayer]:
    """The method's layers of this cache by layer number, made where the cache is still empty.

    Call it from `Handler.cache` at every forward pass. Layers with a sliding window stay as they
    are and are left out.

    Raises:
        InputError: another kind of cache, or one that was filled without the method.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise InputError(
            f"{method} stores keys and values in a DynamicCache, not in "
            f"{'an offloaded cache' if isinstance(cache, Cache) else type(cache).__name__}: leave "
            "past_key_values and cache_implementation out"
        )
    by_layer = {s.layer: s for s in sites if s.kind == "self"}
    if isinstance(cache, DynamicCache) and not cache.layers:
        cache.layers.extend(DynamicLayer() for _ in range(max(by_layer, default=-1) + 1))
    method_layers: dict[int, MethodLayer] = {}
    for number, site in by_layer.items():
        layer = cache.layers[number]
        if type(layer) is DynamicLayer:
            if layer.get_seq_length():
                raise InputError(
                    f"this cache was filled without {method}: read the prompt under it, with a new "
                    "cache"
                )
            layer = cache.layers[number] = make(site)
        if isinstance(layer, MethodLayer):
            if layer.method != method:
                raise InputError(
                    f"{method} and {layer.method} both store keys and values in their own way: "
                    "apply one of them"
                )
            layer.open = True
            method_layers[number] = layer
        elif not getattr(layer, "is_sliding", False):
            raise InputError(
                f"{method} stores keys and values in a DynamicCache, not in layers of kind "
                f"{type(layer).__name__}: leave past_key_values and cache_implementation out"
            )
    if not method_layers:
        raise InputError(
            f"every layer of this model looks through a sliding window: {method} has nothing to do"
        )
    return method_layers


def held_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds, counted from storage.

    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    >>> held_bytes(cache)
    192
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MethodLayer):
            total += layer.nbytes
        elif getattr(layer, "keys", None) is not None:
            stores = {x.untyped_storage().data_ptr(): x for x in (layer.keys, layer.values)}
            total += sum(x.untyped_storage().nbytes() for x in stores.values())
    return total
