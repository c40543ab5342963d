"""Layers of a key-value cache for mixers that keep something else than keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from regard.errors import InputError

from .kinds import KINDS


class StateLayer(CacheLayerMixin):
    """Named tensors with the batch first, and how many tokens they sum up.

    A recurrent state cannot forget its last tokens: cropping, which assisted decoding needs, is
    refused.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.tokens = 0

    def put(self, tokens: int, **state: Tensor) -> None:
        """The state after `tokens` more tokens."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise InputError("this layer keeps a state, no keys and values: its mixer updates it")

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.tokens = {}, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = {n: x.index_select(0, beam_idx.to(x.device)) for n, x in self.state.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = {n: x.repeat_interleave(repeats, 0) for n, x in self.state.items()}

    def offload(self) -> None:
        self.state = {n: x.to("cpu") for n, x in self.state.items()}

    def prefetch(self) -> None:
        """Nothing to fetch: states move with their next use."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError(
                "the state of this mixer cannot forget its last tokens: generate without an "
                "assistant or prompt lookup"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.untyped_storage().nbytes() for x in self.state.values())


def prepare(cache: Cache, mixers: list[str], taylor: str) -> None:
    """Put the layers of these mixers into a cache that is still empty.

    Raises:
        InputError: a cache of another model, or one that cannot grow.
    """
    wanted = [
        StateLayer if states(mixer, taylor) else DynamicLayer for mixer in mixers
    ]  # fmt: skip
    started = cache.get_seq_length() > 0 if cache.layers else False
    for n, kind in enumerate(wanted):
        if len(cache.layers) <= n:
            cache.layers.append(kind())
            continue
        layer = cache.layers[n]
        if isinstance(layer, StateLayer) == (kind is StateLayer):
            continue
        if started or type(layer) is not DynamicLayer:
            raise InputError(
                f"layer {n} of this cache is a {type(layer).__name__}, and its mixer "
                f"{mixers[n]} keeps a state: give an empty DynamicCache"
            )
        cache.layers[n] = kind()


def states(mixer: str, taylor: str) -> bool:
    """Whether a mixer keeps a state in place of keys and values."""
    if mixer == "approximate":
        return taylor == "joint"
    kind = KINDS[mixer]
    return kind.recurrent or kind.module == "mlp" or kind.source in ("noise", "text")


def held(cache: Cache) -> list[int]:
    """Bytes that every layer holds."""
    sizes = []
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, StateLayer):
            sizes.append(layer.nbytes)
        else:
            pair = (layer.keys, layer.values)
            sizes.append(sum(x.numel() * x.element_size() for x in pair if torch.is_tensor(x)))
    return sizes
